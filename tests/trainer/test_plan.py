"""`--dry-run`: the plan of a run, computed without the weights."""

import pytest

from converter.adapter_dir import load_astra
from converter.sources import open_source
from converter.stored import choose_rank
from tests.trainer.test_train import FAST, astra_train
from trainer.cli import main
from trainer.config import load_config
from trainer.plan import plan


@pytest.mark.parametrize("settings", [(), ("train_b=false",), ("rank_pattern={q_proj: 2}",), ("method=mica",)], ids=str)
def test_the_plan_agrees_with_the_run(tiny_base, jsonl, rows, tmp_path, settings, monkeypatch) -> None:
    data = str(jsonl(rows))
    found = plan(str(tiny_base), data, load_config(None, [*FAST, *settings]))
    trained = []

    def count(model, *args):
        trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        return optimise(model, *args)

    from trainer.train import optimise

    monkeypatch.setattr("trainer.train.optimise", count)
    assert astra_train(tiny_base, data, tmp_path / "out", *settings) == 0
    assert [found.trainable] == trained
    origin = load_astra(tmp_path / "out").provenance
    assert found.epochs == pytest.approx(6 * 4 / len(rows))
    if origin["spectra"]:
        assert found.calibration_tokens == max(spectrum["n_tokens"] for spectrum in origin["spectra"].values())
    assert choose_rank(open_source(tmp_path / "out")).stored == found.converted_rank


def test_a_dry_run_reads_no_weights_and_writes_nothing(tiny_base, jsonl, rows, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("trainer.base.AutoModelForCausalLM.from_pretrained", None)
    before = sorted(tmp_path.rglob("*"))
    data = jsonl(rows)
    options = [
        "--base",
        str(tiny_base),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--rank",
        "4",
        "--dry-run",
    ]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "trainable parameters  3,712" in out
    assert "converted rank        8" in out
    assert "null space of W: A0 = 0" in out
    assert sorted(tmp_path.rglob("*")) == sorted([*before, data])


def test_a_dry_run_gives_the_errors_of_the_run(tiny_base, jsonl, rows, tmp_path, capsys) -> None:
    options = ["--base", str(tiny_base), "--data", str(jsonl(rows)), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*options, "--rank", "17"]) == 2
    assert "rank 17 is larger than layer" in capsys.readouterr().err
