"""`astra-convert` on trained adapters: the base with the written LoRA equals the trained model."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from converter.adapter_dir import read_lora_header
from converter.cli import main
from trainer.config import TrainConfig
from trainer.train import optimise, train

IDS = torch.arange(5, 125).view(6, 20)


@pytest.fixture(scope="module")
def trained(tiny_base: Path, rows, tmp_path_factory) -> dict[bool, Path]:
    """Two Astra adapters by `train_b`; beside each folder is a file with the logits of the trained model."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data.jsonl").write_text("\n".join(str(row).replace("'", '"') for row in rows))
    captured = {}

    def capture(model, *args):
        captured["model"] = model
        return optimise(model, *args)

    for train_b in (True, False):
        config = TrainConfig(rank=4, alpha=6, steps=30, batch_size=4, learning_rate=1e-2, train_b=train_b)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trainer.train.optimise", capture)
            train(str(tiny_base), str(folder / "data.jsonl"), folder / str(train_b), config, Progress(disable=True))
        model = captured["model"]
        model.eval()
        with torch.no_grad():
            torch.save(model(input_ids=IDS).logits, folder / f"{train_b}.logits")
    return {train_b: folder / str(train_b) for train_b in (True, False)}


@pytest.mark.parametrize(("train_b", "rank"), [(True, 8), (False, 4)])
def test_peft_with_the_lora_equals_the_trained_model(
    trained, tiny_base: Path, tmp_path: Path, capsys, train_b: bool, rank: int
) -> None:
    assert main([str(trained[train_b]), str(tmp_path / "lora"), "--base", str(tiny_base), "--dtype", "float32"]) == 0
    assert f"LoRA of rank {rank}" in capsys.readouterr().out
    assert read_lora_header(tmp_path / "lora").rank == rank
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        converted = PeftModel.from_pretrained(base, tmp_path / "lora")(input_ids=IDS).logits
    expected = torch.load(trained[train_b].with_suffix(".logits"), weights_only=True)
    assert (plain - expected).abs().max() > 0.1  # the adapter has an effect
    torch.testing.assert_close(converted, expected, rtol=1e-4, atol=1e-5)


def test_the_chat_template_and_the_defaults_of_an_adapter_stay_beside_it(trained, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained[True], adapter)
    content = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"top_k": 3}'}
    for name, text in content.items():
        (adapter / name).write_text(text)
    assert main([str(adapter), str(tmp_path / "lora"), "--no-verify"]) == 0
    assert {name: (tmp_path / "lora" / name).read_text() for name in content} == content
    (adapter / "chat_template.jinja").unlink()
    (adapter / "chat_template.jinja").symlink_to("/etc/passwd")
    assert main([str(adapter), str(tmp_path / "refused"), "--no-verify"]) == 2


def test_the_same_input_gives_the_same_bytes(trained, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert main([str(trained[True]), str(tmp_path / name)]) == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_an_adapter_for_another_base_is_refused_before_anything_is_written(
    trained, tiny_base, tmp_path, capsys
) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(other)
    assert main([str(trained[True]), str(tmp_path / "lora"), "--base", str(other)]) == 2
    assert "was trained on another base" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "lora").exists()


def test_invalid_input_gives_one_line_and_status_2(trained, tmp_path: Path, capsys) -> None:
    (tmp_path / "existing").mkdir()
    for args, message in [
        ([tmp_path / "none", tmp_path / "out"], "there is no folder"),
        ([trained[True], tmp_path / "existing"], "exists already"),
        ([trained[True], Path("/dev/null/lora")], "cannot be made"),
        ([trained[True], tmp_path / "out", "--base", tmp_path / "none"], "is not a folder"),
    ]:
        assert main([str(arg) for arg in args]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("astra-convert: ")
        assert message in line
    assert not (tmp_path / "out").exists()
