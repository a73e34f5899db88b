"""Adapters of multimodal bases on the real engine, for text: each one changes what PEFT changes with it.

The language model of Gemma 3 is the multimodal model; that of Qwen3.5 is a model of its own, whose layers have other
names than those of the multimodal model, which the engine serves.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from converter.cli import main as convert
from tests.converter.foreign import rename
from tests.support.server import astra_serve
from tests.trainer.test_train import astra_train
from tests.trainer.tiny_models import save_base

pytestmark = pytest.mark.timeout(500)
IDS = torch.arange(10, 130).view(6, 20)
WITHOUT_IMAGES = Path(__file__).parents[1] / "support" / "without_images"
TARGETS = r"(model|.*language_model)\.layers\..*(q_proj|o_proj|down_proj|in_proj_qkv|out_proj)"
# The dtype of the engine, the largest distance from PEFT in nats, and the settings that its CPU kernels need.
BASES = {
    "gemma3": ("float32", 1e-4, {"head_dim": 32}),
    "qwen3_5": ("bfloat16", 0.3, {"head_dim": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}),
}


def of_last(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[:, -1].log_softmax(-1)


def by_peft(base: Path, folder: Path, kind: type) -> torch.Tensor:
    """Save a LoRA of random weights that PEFT trains on the class `kind`; return its log probabilities."""
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return of_last(model)


def adapters(base: Path, folder: Path, data: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Write adapters of different tools; yield the name of each and what PEFT computes with it."""
    auto = hf.AutoModelForCausalLM
    (architecture,) = json.loads((base / "config.json").read_text())["architectures"]
    yield "peft", (expected := by_peft(base, folder / "peft", auto))
    yield "multimodal", by_peft(base, folder / "multimodal", getattr(hf, architecture))
    shutil.copytree(folder / "peft", folder / "text")
    rename(folder / "text", lambda key: key.replace("language_model.layers", "layers"))
    yield "text", expected
    settings = ("forgetting_rows=0", "steps=20", "learning_rate=2e-2")
    assert astra_train(base, data, folder / "astra", *settings) == 0
    assert convert([str(folder / "astra"), str(folder / "trained"), "--base", str(base)]) == 0
    yield "trained", of_last(PeftModel.from_pretrained(auto.from_pretrained(base), folder / "trained"))


@pytest.mark.parametrize("name", BASES)
def test_every_adapter_changes_what_it_changes_in_peft(
    name: str, tokenizer, rows, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    dtype, close, settings = BASES[name]
    base = save_base(name, tmp_path / "base", tokenizer, **settings)
    expected = dict(adapters(base, tmp_path, jsonl(rows)))
    plain = of_last(hf.AutoModelForCausalLM.from_pretrained(base))
    document = tmp_path / "adapters.yaml"
    document.write_text(
        "adapters:\n" + "".join(f"- {{name: {one}, source: ./{one}, required: true}}\n" for one in expected)
    )
    options = ["--base", str(base), "--adapters", str(document), "--dtype", dtype]
    options += ["--enforce-eager", "--language-model-only"]
    paths = {"PYTHONPATH": f"{WITHOUT_IMAGES}:{Path(__file__).parents[2]}"}
    with astra_serve(options, tmp_path / "log", environment=paths) as server:
        while (ready := httpx.get(f"{server.url}/readyz", timeout=60)).status_code == 503:
            assert server.process.poll() is None
            assert "failed" not in ready.text, ready.text
            time.sleep(0.2)
        for adapter, wanted in expected.items():
            body = {"model": adapter, "prompt": IDS.tolist(), "max_tokens": 1, "logprobs": 5, "temperature": 0}
            body |= {"return_tokens_as_token_ids": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.is_success, answer.text
            off = apart = 0.0
            for choice in answer.json()["choices"]:
                (found,) = choice["logprobs"]["top_logprobs"]
                ids, served = [int(key.removeprefix("token_id:")) for key in found], torch.tensor([*found.values()])
                off = max(off, float((served - wanted[choice["index"]][ids]).abs().max()))
                apart = max(apart, float((served - plain[choice["index"]][ids]).abs().max()))
            assert off < min(close, apart / 3), f"{adapter}: {off} from PEFT, {apart} from the base"
