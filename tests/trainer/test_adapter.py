"""The adapter on the model: exact start, forward and backward pass, and the choice of target layers."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from converter.delta import delta_weight
from trainer.adapter import Start, adapter_layers, attach, peft_config, target_layers, whole_weight
from trainer.config import TrainConfig
from trainer.errors import TargetError
from trainer.start.methods import astra_start

IDS = torch.arange(5, 45).view(2, 20)


def load(tiny_base: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).requires_grad_(False).eval()


def random_starts(model: PreTrainedModel, config: TrainConfig) -> dict[str, Start]:
    torch.manual_seed(1)
    layers = target_layers(model, config)
    bases = {name: torch.linalg.qr(torch.randn(layer.weight.shape[0], config.rank)).Q for name, layer in layers.items()}
    return {name: astra_start(whole_weight(layers[name]), q) for name, q in bases.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_b", [True, False])
def test_the_output_before_training_equals_the_bases_bit_for_bit(
    tiny_base: Path, dtype: torch.dtype, train_b: bool
) -> None:
    config = TrainConfig(rank=4, alpha=12, train_b=train_b)
    model = load(tiny_base, dtype)
    before = model(input_ids=IDS).logits
    adapted = attach(model, random_starts(model, config), config)
    assert torch.equal(adapted(input_ids=IDS).logits, before)
    assert adapted(input_ids=IDS).logits.dtype == dtype


def test_b0_is_q_and_a0_is_q_transposed_times_w(tiny_base: Path) -> None:
    config = TrainConfig(rank=4)
    model = load(tiny_base)
    weights = {name: layer.weight.clone() for name, layer in target_layers(model, config).items()}
    starts = random_starts(model, config)
    for name, layer in adapter_layers(attach(model, starts, config)).items():
        assert torch.equal(layer.b0, starts[name].b0)
        torch.testing.assert_close(layer.a0, starts[name].b0.T @ weights[name])
        assert torch.equal(layer.a, layer.a0)
        assert torch.equal(layer.b, layer.b0)


def test_the_forward_pass_adds_delta_w(tiny_base: Path) -> None:
    config = TrainConfig(rank=4, alpha=6)
    model = load(tiny_base)
    adapted = attach(model, random_starts(model, config), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    name = "model.layers.0.mlp.gate_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, LoraLayer)
    x = torch.randn(3, 7, layer.in_features)
    delta = delta_weight(adapter_layers(adapted)[name], 6 / 4)
    expected = x.double() @ (layer.get_base_layer().weight.double() + delta).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("train_b", "trained"), [(True, {"lora_A", "lora_B"}), (False, {"lora_A"})])
def test_only_the_updates_are_trainable(tiny_base: Path, train_b: bool, trained: set[str]) -> None:
    config = TrainConfig(rank=4, train_b=train_b)
    model = load(tiny_base)
    adapted = attach(model, random_starts(model, config), config)
    found = {name.split(".")[-3:-1][0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert found == trained
    assert not any("initial" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_the_default_targets_are_all_linear_layers_but_the_head(tiny_base: Path) -> None:
    names = target_layers(load(tiny_base), TrainConfig(rank=4))
    assert len(names) == 14
    assert "lm_head" not in names


def test_target_modules_match_names_and_ends_of_names(tiny_base: Path) -> None:
    config = TrainConfig(rank=4, target_modules=["q_proj", "model.layers.0.mlp.up_proj"])
    assert set(target_layers(load(tiny_base), config)) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }


def test_an_unknown_target_is_refused_with_the_available_names(tiny_base: Path) -> None:
    with pytest.raises(TargetError, match=r"'query'; available: down_proj, gate_proj, k_proj, .*v_proj$"):
        target_layers(load(tiny_base), TrainConfig(rank=4, target_modules=["query"]))


class QuantisedLinear(nn.Linear):
    """A linear layer with an int8 weight and one scale per output; PEFT recognises it by `W_q`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.W_q = self.weight

    def dequantize(self) -> torch.Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize())


def test_a_quantised_base_has_an_exact_start_and_gradients(tiny_base: Path) -> None:
    config = TrainConfig(rank=4, target_modules=["down_proj"])
    model = load(tiny_base)
    for block in model.model.layers:
        block.mlp.down_proj = QuantisedLinear(block.mlp.down_proj)
    before = model(input_ids=IDS).logits
    starts = random_starts(model, config)
    name = "model.layers.1.mlp.down_proj"
    dequantised = model.get_submodule(name).dequantize()
    torch.testing.assert_close(starts[name].a0, starts[name].b0.T @ dequantised)
    adapted = attach(model, starts, config)
    assert torch.equal(adapted(input_ids=IDS).logits, before)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3] for n in trained} == {"lora_A", "lora_B"}
    assert all(p.grad is not None for p in trained.values())
    assert torch.equal(whole_weight(model.get_submodule(name).base_layer), dequantised)


def test_layers_of_different_ranks_share_one_scaling(tiny_base: Path) -> None:
    config = TrainConfig(rank=4, alpha=8)
    model = load(tiny_base)
    starts = random_starts(model, config)
    name = "model.layers.0.self_attn.q_proj"
    starts[name] = Start(starts[name].a0[:2], starts[name].b0[:, :2])
    adapted = attach(model, starts, config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    assert layers[name].r["default"] == 4
    assert adapter_layers(adapted)[name].a.shape == (2, 32)
    settings = peft_config(config, "base", {n: len(s.a0) for n, s in starts.items()})
    assert settings.rank_pattern == {name: 2}
