"""A run that fails says why in one line, and leaves nothing that blocks the corrected command."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.loop
import trainer.train
from tests.trainer.test_train import FAST, astra_train, files
from trainer.cli import main
from trainer.errors import OutOfMemory
from trainer.failures import in_one_line


@pytest.mark.parametrize("step", ["initialise", "optimise", "spectra_after"])
def test_out_of_memory_is_one_line_and_leaves_nothing(
    step, tiny_base, jsonl, rows, tmp_path, capsys, monkeypatch
) -> None:
    def allocate(*_: Any) -> None:
        torch.empty(2**60)  # raises what PyTorch raises on this machine

    data = jsonl(rows)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.train, step, allocate)
        assert astra_train(tiny_base, data, tmp_path / "work" / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("astra-train: out of memory: set gradient_accumulation")
    assert sorted(tmp_path.rglob("*")) == before
    assert astra_train(tiny_base, data, tmp_path / "work" / "out", "gradient_accumulation=2") == 0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...")], ids=repr)
def test_every_kind_of_missing_memory_is_recognised(error, tmp_path) -> None:
    with pytest.raises(OutOfMemory), in_one_line(tmp_path):
        raise error


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="a fault"), in_one_line(tmp_path):
        raise RuntimeError("a fault")


@pytest.mark.parametrize("full_after", [0, 1])
def test_a_full_disk_is_one_line_and_a_complete_checkpoint_stays(
    tiny_base, jsonl, rows, tmp_path, capsys, monkeypatch, full_after: int
) -> None:
    mark_complete = trainer.loop.mark_complete
    written: list[Path] = []

    def write_or_fail(checkpoint: Path) -> None:
        if len(written) == full_after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(checkpoint)
        mark_complete(checkpoint)

    data, out = jsonl(rows), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.loop, "mark_complete", write_or_fail)
        assert astra_train(tiny_base, data, out, "save_steps=2") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"astra-train: {out} cannot be written: no space left on the disk; free some and try again"
    if not full_after:
        assert sorted(tmp_path.rglob("*")) == before
        return
    options = [word for setting in (*FAST, "save_steps=2") for word in ("--set", setting)]
    options += ["--base", str(tiny_base), "--data", str(data), "--out", str(out)]
    assert main([*options, "--resume"]) == 0
    assert astra_train(tiny_base, data, tmp_path / "uninterrupted", "save_steps=2") == 0
    assert files(out) == files(tmp_path / "uninterrupted")


def test_resume_compares_the_chat_template(tiny_base, jsonl, rows, tmp_path, capsys, monkeypatch) -> None:
    base, data, out = tmp_path / "base", jsonl(rows), tmp_path / "out"
    shutil.copytree(tiny_base, base)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.report.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            astra_train(base, data, out)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    options = [word for setting in FAST for word in ("--set", setting)]
    assert main(["--base", str(base), "--data", str(data), "--out", str(out), "--resume", *options]) == 2
    assert "has chat_template='sha256:" in capsys.readouterr().err
