"""The page of training loops: each script runs as it is written, and what it saves is what it has trained."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

import trainer.sft
from trainer import exact_start, get_astra_model

PAGE = Path(trainer.sft.__file__).with_name("loops.md")
SCRIPTS = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
IDS = torch.arange(5, 45).view(2, 20)


NEEDS_GPU = "TRL's AsyncGRPOTrainer"


@pytest.mark.filterwarnings("default")  # the trainers' own, on a CPU
@pytest.mark.parametrize("title", [title for title in SCRIPTS if title != NEEDS_GPU])
def test_a_loop_of_the_page_saves_what_it_trains(title, tiny_base, tmp_path, monkeypatch) -> None:
    script, out = tmp_path / "loop.py", tmp_path / "lora"
    script.write_text(SCRIPTS[title])
    monkeypatch.setattr(sys, "argv", [str(script), str(tiny_base), str(out)])
    model = runpy.run_path(str(script), run_name="__main__")["model"]
    model = getattr(model, "module", model)
    assert isinstance(model, exact_start.AstraModelForCausalLM)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        before, trained = base(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
        for folder in (out, *out.with_name("lora-runs").glob("checkpoint-3")):
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
            torch.testing.assert_close(loaded(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)
    assert (trained - before).abs().max() > 1e-3


def test_each_script_is_short_and_can_be_compiled() -> None:
    assert NEEDS_GPU in SCRIPTS
    for title, script in SCRIPTS.items():
        assert len(script.splitlines()) < 40
        compile(script, title, "exec")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("train_b", [True, False])
def test_asynchronous_grpo_publishes_the_policy_of_the_third_step(train_b, tiny_base, tmp_path) -> None:
    """By the functions with which TRL's AsyncGRPOTrainer decides what to publish, and writes it."""
    trl = importlib.import_module("trl.experimental.async_grpo.async_grpo_trainer")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    rows = [{"input_ids": ids} for ids in IDS.tolist()]
    model = get_astra_model(base, LoraConfig(r=4), rows, train_b=train_b, show_progress_bar=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = trl.validate_lora_for_vllm_sync(model)
    assert settings.r == (8 if train_b else 4)
    trl.save_lora_adapter(model, Accelerator(cpu=True), "default", str(tmp_path / "trl-policy-v3"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "trl-policy-v3")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - model.unload()(input_ids=IDS).logits).abs().max() > 0.05
