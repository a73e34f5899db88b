"""The trainable adapter on a PEFT model.

For a target layer with weight W (d_out, d_in) the adapter is A = A0 + dA (r, d_in) and B = B0 + dB (d_out, r). PEFT's
`lora_A` and `lora_B` hold the trained updates dA and dB, both zero at the start of training. The frozen pair A0, B0 is
held by `ExactStart`, a hook of PEFT into the layer's forward pass. The hook adds

    s (B A - B0 A0) x  =  s (dB A x + B0 dA x)        s: scaling

The right-hand side, which the converter uses too, does not cancel in low precision. At dA = dB = 0 it is exactly zero:
the output before the first step equals the base's bit for bit. W is never changed, so quantised bases work and one base
serves all tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from converter.adapter_dir import AstraLayer, Json
from trainer.config import TrainConfig
from trainer.expert_adapters import expert_wrappers, names_of_experts, split_experts
from trainer.experts import loadable_targets, names_as_they_are
from trainer.targets import chosen_layers, head_modules, peft_targets

ADAPTER = "default"
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS"}


@dataclass(frozen=True)
class Start:
    """The initial values A0 and B0 of one layer's adapter, float32; stacked experts have a dimension (experts) more."""

    a0: torch.Tensor  # (r, d_in)
    b0: torch.Tensor  # (d_out, r); zero for experts

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a0.shape[-2]


class _AdapterOutput(torch.autograd.Function):
    """s (dB A x + B0 dA x) with a backward pass written by hand.

    It reads x and the output gradient as often as plain LoRA does. Autograd would store a float32 copy of x and read x
    twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        d_a: torch.Tensor,
        d_b: torch.Tensor,
        a0: torch.Tensor,
        b0: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return (..., d_out) for x (..., d_in), in the adapter's dtype."""
        a0_x, d_a_x = F.linear(x.to(d_a.dtype), torch.cat([a0, d_a])).chunk(2, dim=-1)
        inner = torch.cat([a0_x + d_a_x, d_a_x], dim=-1)  # A x and dA x, (..., 2r)
        ctx.save_for_backward(x, inner, d_a, d_b, a0, b0)
        ctx.scaling = scaling
        return F.linear(inner, scaling * torch.cat([d_b, b0], dim=1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, dA and dB, given the gradient of the output (..., d_out)."""
        (gradient,) = gradients
        x, inner, d_a, d_b, a0, b0 = ctx.saved_tensors
        rank = len(d_a)
        through_b, through_b0 = F.linear(gradient, ctx.scaling * torch.cat([d_b, b0], dim=1).T).chunk(2, dim=-1)
        grad_d_a_x = through_b + through_b0
        grad_x = grad_d_a = grad_d_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (torch.cat([through_b, grad_d_a_x], dim=-1) @ torch.cat([a0, d_a])).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_d_a = grad_d_a_x.flatten(0, -2).T @ x.to(d_a.dtype).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_d_b = ctx.scaling * gradient.flatten(0, -2).T @ inner[..., :rank].flatten(0, -2)
        return grad_x, grad_d_a, grad_d_b, None, None, None


class ExactStart(LoraVariant):
    """PEFT's hook into the forward pass of one LoRA layer; it holds the layer's A0 (r, d_in) and B0 (d_out, r)."""

    def __init__(self, start: Start, device: torch.device) -> None:
        self.a0, self.b0 = start.a0.to(device), start.b0.to(device)

    def forward(
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return result (..., d_out) + s (B A - B0 A0) x for x (..., d_in)."""
        d_a, d_b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        added: torch.Tensor = _AdapterOutput.apply(x, d_a, d_b, self.a0, self.b0, module.scaling[active_adapter])
        return result + added


class ExpertStart(LoraVariant):
    """The start of stacked experts, which PEFT trains as A and B = 0; nothing is added to their outputs."""

    def __init__(self, start: Start) -> None:
        self.start = start


def target_layers(model: PreTrainedModel, config: TrainConfig) -> dict[str, nn.Linear]:
    """Return the layers to adapt, by module name (see `trainer.targets`). Raises TargetError."""
    return cast(dict[str, nn.Linear], chosen_layers(model, config))  # a Conv1D has other attributes: layer_shape


@torch.no_grad()
def whole_weight(layer: nn.Linear) -> torch.Tensor:
    """Return W (d_out, d_in) of a layer in a floating-point dtype: gathered from its shards, or dequantised."""
    weight = layer.weight
    if isinstance(layer, Conv1D):
        return weight.detach().T
    if isinstance(weight, DTensor):
        gathered: torch.Tensor = weight.full_tensor()
        return gathered
    if weight.is_floating_point() and not hasattr(layer, "W_q"):
        return weight.detach()
    state = getattr(layer, "state", None)
    if state is not None:  # bitsandbytes int8: on a CPU, PEFT's dequantisation moves the weight and loses its scales
        scales: Any = getattr(weight, "SCB", None) if state.SCB is None else state.SCB
        rescaled: torch.Tensor = weight.detach().float() * scales[:, None] / 127
        return rescaled
    whole: torch.Tensor = dequantize_module_weight(layer).detach()
    return whole


def peft_config(
    config: TrainConfig,
    base: str,
    ranks: Mapping[str, int],
    targets: Sequence[str] = (),
    heads: Sequence[str] = (),
) -> LoraConfig:
    """Return PEFT's config of an adapter with the given rank of each layer and one scaling for all layers.

    `targets` are PEFT's names of the layers, by default the last parts of their names; `heads` are the modules of a
    classifier's head.
    """
    other_ranks = {name: rank for name, rank in ranks.items() if rank != config.rank}
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.scaling * config.rank,
        rank_pattern=other_ranks,
        alpha_pattern={name: config.scaling * rank for name, rank in other_ranks.items()},
        target_modules=list(targets) or sorted({name.rpartition(".")[2] for name in ranks}),
        init_lora_weights=False,
        task_type=_TASK_TYPES[config.task],
        modules_to_save=list(heads) or None,
        base_model_name_or_path=base,
    )


def attach(model: PreTrainedModel, starts: Mapping[str, Start], config: TrainConfig) -> PeftModel:
    """Return `model`, wrapped by PEFT in place, with an adapter on each layer and stacked parameter of `starts`."""
    heads = head_modules(model) if config.task == "classification" else []
    linear = {name: start for name, start in starts.items() if start.a0.ndim == 2}
    ranks = {name: start.rank for name, start in linear.items()}
    settings = peft_config(config, model.name_or_path, ranks, peft_targets(model, linear, heads), heads)
    settings.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in linear)
    settings.target_parameters = [name for name in starts if name not in linear] or None
    with names_as_they_are(model):
        peft_model = get_peft_model(model, settings, adapter_name=ADAPTER)
    for name, wrapper in expert_wrappers(model).items():
        wrapper.lora_variant[ADAPTER] = ExpertStart(starts[name])
        with torch.no_grad():
            wrapper.lora_A[ADAPTER].weight.copy_(starts[name].a0.flatten(0, 1))
        nn.init.zeros_(wrapper.lora_B[ADAPTER].weight)
    for name, start in linear.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        layer.lora_variant[ADAPTER] = ExactStart(start, a.device)
        layer.cast_input_dtype_enabled = False  # otherwise PEFT keeps a float32 copy of each input for backward
        nn.init.zeros_(a)
        nn.init.zeros_(b)
        b.requires_grad_(config.train_b and config.method != "mica")  # MiCA trains A alone
    return peft_model


def saved_config(model: PeftModel, base: str) -> Json:
    """Return the config with which PEFT adapts the same layers of the base named `base` (see `trainer.experts`)."""
    settings = model.peft_config[ADAPTER]
    modules, parameters = loadable_targets(model.get_base_model(), settings.target_modules)
    if expert_wrappers(model):
        names = names_of_experts(model.get_base_model())
        assert names is not None
        modules = sorted({*modules, *names.projections})  # what PEFT takes for the stacked parameters
    found: Json = {**settings.to_dict(), "base_model_name_or_path": base, "target_modules": modules}
    return {**found, "target_parameters": parameters or None}


@torch.no_grad()
def adapter_layers(model: PeftModel) -> dict[str, AstraLayer]:
    """Return A, B, A0 and B0 of each adapted layer, by the layer's name in the base, on disk for experts."""
    layers = {}
    for name, layer in adapted_modules(model).items():
        exact = layer.lora_variant[ADAPTER]
        d_a, d_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        layers[name] = AstraLayer(a=exact.a0 + d_a, b=exact.b0 + d_b, a0=exact.a0.clone(), b0=exact.b0.clone())
    return layers | _expert_layers(model)


def _expert_layers(model: PeftModel) -> dict[str, AstraLayer]:
    """Return the layers of `adapter_layers` that are of single experts."""
    layers: dict[str, AstraLayer] = {}
    names = names_of_experts(model.get_base_model())
    for name, wrapper in expert_wrappers(model.get_base_model()).items():
        assert names is not None
        start, weight_b = wrapper.lora_variant[ADAPTER].start, wrapper.lora_B[ADAPTER].weight
        a = wrapper.lora_A[ADAPTER].weight.reshape(start.a0.shape)
        b = weight_b.reshape(len(weight_b), start.rank, -1).permute(2, 0, 1)  # PEFT's order: (d_out, r, experts)
        initial = split_experts(names, name, start.a0.to(a.device), start.b0.to(a.device))
        for (layer, a_e, b_e), (_, a0, b0) in zip(split_experts(names, name, a, b), initial, strict=True):
            layers[layer] = AstraLayer(a=a_e, b=b_e, a0=a0, b0=b0)
    return layers


def adapted_modules(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the adapted linear layers, by their names in the base."""
    modules = model.get_base_model().named_modules()
    return {
        name: layer for name, layer in modules if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
    }


def trained_head(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the parameters of a classifier's head, which is trained in full, by their names in the base."""
    return {
        name.replace(f"modules_to_save.{ADAPTER}.", ""): parameter.detach()
        for name, parameter in model.get_base_model().named_parameters()
        if f"modules_to_save.{ADAPTER}" in name
    }
