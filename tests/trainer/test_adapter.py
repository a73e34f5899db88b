"""The exact start, the forward pass, and which layers are adapted."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from converter.delta import delta_weight
from trainer.adapter import adapter_layers, attach, target_layers
from trainer.config import TrainConfig
from trainer.errors import TargetError

IDS = torch.arange(5, 45).view(2, 20)


def load(tiny_base: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).requires_grad_(False).eval()


def random_bases(model: PreTrainedModel, config: TrainConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.linalg.qr(torch.randn(layer.weight.shape[0], config.rank)).Q
        for name, layer in target_layers(model, config).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_b", [True, False])
def test_output_before_the_first_step_equals_the_bases_bit_for_bit(
    tiny_base: Path, dtype: torch.dtype, train_b: bool
) -> None:
    config = TrainConfig(rank=4, alpha=12, train_b=train_b)
    model = load(tiny_base, dtype)
    before = model(input_ids=IDS).logits
    adapted = attach(model, random_bases(model, config), config)
    assert torch.equal(adapted(input_ids=IDS).logits, before)
    assert adapted(input_ids=IDS).logits.dtype == dtype


def test_the_start_is_b0_equals_q_and_a0_equals_q_transposed_times_w(tiny_base: Path) -> None:
    config = TrainConfig(rank=4)
    model = load(tiny_base)
    weights = {name: layer.weight.clone() for name, layer in target_layers(model, config).items()}
    bases = random_bases(model, config)
    for name, layer in adapter_layers(attach(model, bases, config)).items():
        torch.testing.assert_close(layer.b0, bases[name])
        torch.testing.assert_close(layer.a0, bases[name].T @ weights[name])
        assert torch.equal(layer.a, layer.a0)
        assert torch.equal(layer.b, layer.b0)


def test_the_forward_pass_adds_the_delta_of_the_paper(tiny_base: Path) -> None:
    config = TrainConfig(rank=4, alpha=6)
    model = load(tiny_base)
    adapted = attach(model, random_bases(model, config), config)
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
def test_only_the_moves_are_trained_and_the_base_and_the_start_stay(
    tiny_base: Path, train_b: bool, trained: set[str]
) -> None:
    config = TrainConfig(rank=4, train_b=train_b)
    model = load(tiny_base)
    adapted = attach(model, random_bases(model, config), config)
    found = {name.split(".")[-3:-1][0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert found == trained
    assert not any("initial" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_all_linear_layers_but_the_head_are_targets_by_default(tiny_base: Path) -> None:
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


def test_a_target_that_does_not_exist_is_refused_with_the_names_there_are(tiny_base: Path) -> None:
    with pytest.raises(TargetError, match=r"'query'; there are: down_proj, gate_proj, k_proj, .*v_proj$"):
        target_layers(load(tiny_base), TrainConfig(rank=4, target_modules=["query"]))


def test_a_quantised_layer_is_refused(tiny_base: Path) -> None:
    model = load(tiny_base)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"up_proj is quantised \(torch.int8\)"):
        target_layers(model, TrainConfig(rank=4))


def test_a_rank_larger_than_a_layer_is_refused(tiny_base: Path) -> None:
    with pytest.raises(TargetError, match=r"rank 17 is larger than layer model.layers.0.self_attn.k_proj \(16, 32\)"):
        target_layers(load(tiny_base), TrainConfig(rank=17))
