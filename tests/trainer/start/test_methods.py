"""The starts of the other methods: those of PEFT, on an unchanged base."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from converter.adapter_dir import load_astra
from converter.cli import main as convert
from tests.trainer.test_train import astra_train
from trainer.adapter import adapter_layers, attach, target_layers
from trainer.config import Method, TrainConfig
from trainer.data import Batch, batches
from trainer.start.methods import other_starts

OTHERS = [method for method in get_args(Method) if method not in ("astra", "full")]
IDS = torch.arange(5, 45).view(2, 20)


def load(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base).requires_grad_(False).eval()


@pytest.fixture
def calibration(tokenizer) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 200, (n,), generator=generator).tolist() for n in (20, 33, 40, 25, 31, 40)]
    return batches([{"input_ids": row, "labels": row} for row in ids], 2, tokenizer)


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_starts_at_the_bases_output_without_changing_the_base(
    tiny_base: Path, calibration, method: Method
) -> None:
    config = TrainConfig(method=method, rank=4)
    model = load(tiny_base)
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(input_ids=IDS).logits
    layers = target_layers(model, config)
    starts = other_starts(model, layers, dict.fromkeys(layers, 4), calibration, config, lambda: None)
    assert {name: torch.equal(model.state_dict()[name], old) for name, old in reference.items()} == dict.fromkeys(
        reference, True
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(hasattr(layer, name) for layer in layers.values() for name in ("eigens", "_peft_loraga_grad"))
    adapted = attach(model, starts, config)
    assert torch.equal(adapted(input_ids=IDS).logits, before)
    starts_at_zero = method in ("lora", "rslora", "eva", "mica")
    for layer in adapter_layers(adapted).values():
        assert bool((layer.b0 @ layer.a0).any()) is not starts_at_zero


@pytest.mark.parametrize("method", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("alpha", [4, 12])
def test_the_start_equals_that_of_peft(tiny_base: Path, calibration, method: Method, alpha: int) -> None:
    config = TrainConfig(method=method, rank=4, alpha=alpha)
    model = load(tiny_base)
    layers = target_layers(model, config)
    starts = other_starts(model, layers, dict.fromkeys(layers, 4), calibration, config, lambda: None)
    peft_model = get_peft_model(
        load(tiny_base),
        LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "up_proj"], init_lora_weights=method),
    )
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        layer = peft_model.get_base_model().get_submodule(name)
        torch.testing.assert_close(starts[name].a0, layer.lora_A["default"].weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(starts[name].b0, layer.lora_B["default"].weight, rtol=1e-4, atol=1e-5)


def test_milora_starts_with_the_minor_singular_components(tiny_base: Path, calibration) -> None:
    config = TrainConfig(method="milora", rank=4, alpha=8)
    model = load(tiny_base)
    layers = target_layers(model, config)
    starts = other_starts(model, layers, dict.fromkeys(layers, 4), calibration, config, lambda: None)
    name = "model.layers.0.mlp.down_proj"
    u, s, vh = torch.linalg.svd(layers[name].weight, full_matrices=False)
    expected = u[:, -4:] @ s[-4:].diag() @ vh[-4:]
    torch.testing.assert_close(2 * starts[name].b0 @ starts[name].a0, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["pissa", "lora_ga", "mica"])
def test_an_adapter_of_another_method_converts_to_the_trained_model(
    tiny_base: Path, jsonl, rows, tmp_path, method: Method, monkeypatch
) -> None:
    from trainer.train import optimise

    def capture(model, *args):
        result = optimise(model, *args)
        captured.append(model)
        return result

    captured: list[PeftModel] = []
    monkeypatch.setattr("trainer.train.optimise", capture)
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", f"method={method}", "steps=20") == 0
    assert convert([str(tmp_path / "out"), str(tmp_path / "lora"), "--dtype", "float32"]) == 0
    base = load(tiny_base)
    with torch.no_grad():
        expected, plain = captured[0].eval()(input_ids=IDS).logits, base(input_ids=IDS).logits
        converted = PeftModel.from_pretrained(base, tmp_path / "lora")(input_ids=IDS).logits
    assert (plain - expected).abs().max() > 0.01
    torch.testing.assert_close(converted, expected, rtol=1e-3, atol=1e-4)
    if method == "mica":
        assert all(torch.equal(layer.b, layer.b0) for layer in load_astra(tmp_path / "out").layers.values())


def test_full_fine_tuning_gives_a_model_that_transformers_loads(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "method=full", "steps=20") == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.model.embed_tokens.weight, load(tiny_base).model.embed_tokens.weight)
    assert "Fine-tuned model" in (tmp_path / "out" / "README.md").read_text()
    assert convert([str(tmp_path / "out"), str(tmp_path / "lora")]) == 2
