"""Direct preference optimisation: from rows with two answers to an adapter that prefers one of them."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.test_train import FAST, astra_train, files
from tests.trainer.tiny_models import convert
from trainer import get_astra_model
from trainer.analysis.page import analyze
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.data import preference_examples
from trainer.learning_rate import losses_of
from trainer.sft import trl

ROWS = [{"prompt": f"{i} plus one is", "chosen": f" {i + 1}, yes", "rejected": f" {i + 1}, no"} for i in range(40)]
DPO = ("task=dpo", "rank=4", "learning_rate=auto", "forgetting_rows=0")


def margins(model: torch.nn.Module, base: Path) -> list[float]:
    """The log probability of each row's chosen answer minus that of the rejected one."""
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for row in ROWS:
        pair = []
        for answer in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([[*prompt, *tokenizer(row[answer])["input_ids"], tokenizer.eos_token_id]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
            with torch.no_grad():
                pair.append(-float(model(input_ids=ids, labels=labels).loss) * (ids.shape[1] - len(prompt)))
        found.append(pair[0] - pair[1])
    return found


def test_an_adapter_learns_preferences_and_converts(tiny_base, jsonl, tmp_path) -> None:
    data, options = jsonl(ROWS), (*DPO, "steps=12", "eval_share=0.2", "eval_steps=4", "eval_metric=accuracy")
    assert astra_train(tiny_base, data, tmp_path / "out", *options) == 0
    record = json.loads((tmp_path / "out" / "astra.json").read_text())
    curve = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert curve[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the adapter is the base
    assert curve[-1]["loss"] < 0.65
    assert [row["eval_accuracy"] for row in record["evaluations"]][-1] > 0.9
    assert "nats per pair" in (tmp_path / "out" / "README.md").read_text()
    analyze(tmp_path / "out", tmp_path / "report.html")
    assert "nats per pair" in (tmp_path / "report.html").read_text()
    assert convert([str(tmp_path / "out"), str(tmp_path / "lora")]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = margins(base, tiny_base)
    after = margins(PeftModel.from_pretrained(base, tmp_path / "lora"), tiny_base)
    assert all(new > old + 0.1 for new, old in zip(after, before, strict=True))


def test_a_resumed_run_has_the_same_bytes(tiny_base, jsonl, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("stopped")

    data, options = jsonl(ROWS), (*DPO, "steps=4", "save_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr("trainer.report.write", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            astra_train(tiny_base, data, tmp_path / "out", *options)
    words = [word for setting in (*FAST, *options) for word in ("--set", setting)]
    assert (
        main(["--base", str(tiny_base), "--data", str(data), "--out", str(tmp_path / "out"), "--resume", *words]) == 0
    )
    assert astra_train(tiny_base, data, tmp_path / "uninterrupted", *options) == 0
    assert files(tmp_path / "out") == files(tmp_path / "uninterrupted")


def test_the_automatic_rate_has_the_gradient_of_trls_loss(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    config = TrainConfig(task="dpo", rank=4, batch_size=8)
    model = get_astra_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(r=4), ROWS, tokenizer)
    moves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sum(losses_of(model, preference_examples(ROWS[:8], tokenizer, 64, "rows"), tokenizer, config)).backward()
    ours = [parameter.grad.clone() for parameter in moves]
    model.zero_grad()
    arguments = trl.DPOConfig(str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to="none")
    trainer = trl.DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(ROWS[:8]), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model, batch).backward()
    for mine, parameter in zip(ours, moves, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["method=full"], "task=dpo compares the adapter with the base, which method=full would change"),
        (["packing=true"], "packing requires task=causal_lm"),
        (["eval_metric=exact_match", "eval_share=0.2"], "exact_match requires task=causal_lm"),
    ],
)
def test_settings_that_preferences_exclude_are_one_line(settings, reason, tiny_base, jsonl, tmp_path, capsys) -> None:
    assert astra_train(tiny_base, jsonl(ROWS), tmp_path / "out", "task=dpo", *settings) == 2
    assert reason in capsys.readouterr().err
