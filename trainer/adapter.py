"""The trainable adapter on a PEFT model: A0 and B0 beside the base, and a start that changes nothing at all.

Two PEFT adapters lie on each target layer. `initial` is frozen and holds A0 = Q^T W and B0 = Q. `default` is trained
and holds the *moves* dA and dB, both zero at the start. The forward pass adds

    s (B A - B0 A0) x  =  s [dB | B0] [A0 + dA ; dA] x

in two matrix products, the cancellation-free form of the converter. With dA = dB = 0 it adds exact zeros, so the first
output is the base's bit for bit; and W is never touched, so one base serves every task.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from converter.adapter_dir import AstraLayer
from trainer.config import TrainConfig
from trainer.errors import TargetError

INITIAL, TRAINED = "initial", "default"


class ExactStart(LoraVariant):
    """PEFT's hook into a LoRA layer's forward pass."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return result (..., d_out) + s (B A - B0 A0) x for x (..., d_in)."""
        d_a, d_b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        a0, b0 = module.lora_A[INITIAL].weight, module.lora_B[INITIAL].weight
        inner = F.linear(x.to(d_a.dtype), torch.cat([a0 + d_a, d_a]))
        change: torch.Tensor = module.scaling[active_adapter] * F.linear(inner, torch.cat([d_b, b0], dim=1))
        return result + change


def target_layers(model: PreTrainedModel, config: TrainConfig) -> dict[str, nn.Linear]:
    """Return the linear layers to adapt, by name. Raises TargetError."""
    head = model.get_output_embeddings()
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    wanted = config.target_modules
    if wanted == "all-linear":
        found = linear
    else:
        found = {n: m for n, m in linear.items() if any(n == w or n.endswith(f".{w}") for w in wanted)}
        for name in wanted:
            if not any(n == name or n.endswith(f".{name}") for n in linear):
                there = ", ".join(sorted({n.rpartition(".")[2] for n in linear}))
                raise TargetError(f"target_modules: no linear layer is named {name!r}; there are: {there}")
    if not found:
        raise TargetError(f"no linear layer to adapt was found in {type(model).__name__}")
    for name, layer in found.items():
        shape = tuple(layer.weight.shape)
        if not layer.weight.is_floating_point():
            raise TargetError(f"layer {name} is quantised ({layer.weight.dtype}): use the unquantised base")
        if config.rank > min(shape):
            raise TargetError(
                f"rank {config.rank} is larger than layer {name} {shape}: lower rank, or set target_modules"
            )
    return found


def peft_config(config: TrainConfig, base: str, layers: Iterable[str]) -> LoraConfig:
    """Return PEFT's description of an adapter on `layers`, which `target_layers` chose."""
    wanted = config.target_modules
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}) if wanted == "all-linear" else wanted,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def attach(model: PreTrainedModel, bases: dict[str, torch.Tensor], config: TrainConfig) -> PeftModel:
    """Put the adapter on the layers named in `bases`, which maps each to its Q (d_out, r); B0 = Q and A0 = Q^T W."""
    settings = peft_config(config, model.name_or_path, bases)
    peft_model = get_peft_model(model, settings, adapter_name=TRAINED)
    peft_model.add_adapter(INITIAL, settings)
    peft_model.set_adapter(TRAINED)
    for name, q in bases.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        layer.lora_variant[TRAINED] = ExactStart()
        with torch.no_grad():
            weight = layer.get_base_layer().weight
            layer.lora_A[INITIAL].weight.copy_(q.T.to(weight.device) @ weight.float())
            layer.lora_B[INITIAL].weight.copy_(q)
            layer.lora_A[TRAINED].weight.zero_()
            layer.lora_B[TRAINED].weight.zero_()
        layer.lora_B[TRAINED].weight.requires_grad_(config.train_b)
    return peft_model


@torch.no_grad()
def adapter_layers(model: PeftModel) -> dict[str, AstraLayer]:
    """Return A, B, A0 and B0 of every adapted layer, by the layer's name in the base."""
    layers = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            a0, b0 = layer.lora_A[INITIAL].weight, layer.lora_B[INITIAL].weight
            d_a, d_b = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
            layers[name] = AstraLayer(a=a0 + d_a, b=b0 + d_b, a0=a0.clone(), b0=b0.clone())
    return layers
