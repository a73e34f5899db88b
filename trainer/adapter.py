"""The trainable adapter on a PEFT model: where it goes, what it starts from, and what training has made of it.

Methods that start away from zero (Astra, PiSSA, ...) train the modules of `trainer.exact_start`; LoRA and its variants
whose B starts at zero, and experts, train PEFT's own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from converter.adapter_dir import AstraLayer, Json
from trainer.config import TrainConfig
from trainer.exact_start import MODELS, AstraModel, has_start, is_pair, set_factors, with_reference
from trainer.expert_adapters import expert_wrappers, names_of_experts, split_experts
from trainer.experts import loadable_targets, names_as_they_are
from trainer.targets import chosen_layers, head_modules, peft_targets

ADAPTER = "default"
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "dpo": "CAUSAL_LM", "classification": "SEQ_CLS"}


@dataclass(frozen=True)
class Start:
    """The initial values A0 and B0 of one layer's adapter, float32; stacked experts have a dimension (experts) more."""

    a0: torch.Tensor  # (r, d_in)
    b0: torch.Tensor  # (d_out, r); zero for experts

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a0.shape[-2]


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
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.rank
    other_ranks = {name: other for name, other in ranks.items() if other != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=config.scaling * rank,
        rank_pattern=other_ranks,
        alpha_pattern={name: config.scaling * rank for name, rank in other_ranks.items()},
        target_modules=list(targets) or sorted({name.rpartition(".")[2] for name in ranks}),
        init_lora_weights=False,
        task_type=_TASK_TYPES[config.task],
        modules_to_save=list(heads) or None,
        base_model_name_or_path=base,
    )


def attach(model: PreTrainedModel, starts: Mapping[str, Start], config: TrainConfig) -> PeftModel:
    """Return `model`, wrapped by PEFT in place, with an adapter on each layer and stacked parameter of `starts`.

    The ranks in PEFT's config are those of the standard LoRA (see `trainer.exact_start`).
    """
    heads = head_modules(model) if config.task == "classification" else []
    linear = {name: start for name, start in starts.items() if start.a0.ndim == 2}
    is_plain = not any(start.b0.any() for start in linear.values())
    train_b = config.train_b and config.method != "mica"  # MiCA trains A alone
    ranks = {name: start.rank * (1 if is_plain or not train_b else 2) for name, start in linear.items()}
    settings = peft_config(config, model.name_or_path, ranks, peft_targets(model, linear, heads), heads)
    settings.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in linear)
    settings.target_parameters = [name for name in starts if name not in linear] or None
    with names_as_they_are(model):
        peft_model = MODELS.get(settings.task_type, AstraModel)(model, settings, adapter_name=ADAPTER)
    for name, wrapper in expert_wrappers(model).items():
        _set_plain(wrapper, starts[name].a0.flatten(0, 1))
    for name, start in linear.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        if is_plain:
            _set_plain(layer, start.a0)
        else:
            set_factors(layer, ADAPTER, start.a0, start.b0, train_b=train_b)
    return peft_model


def restart(model: PeftModel, starts: Mapping[str, Start], config: TrainConfig) -> None:
    """Give the adapter of a model that PEFT has made the starts of its layers, in place, and one scaling to all."""
    settings, factor = model.peft_config[ADAPTER], 2 if config.train_b else 1
    for name, layer in adapted_modules(model).items():
        set_factors(layer, ADAPTER, starts[name].a0, starts[name].b0, train_b=config.train_b)
        layer.r[ADAPTER] = factor * starts[name].rank
        layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = config.scaling * layer.r[ADAPTER], config.scaling
    settings.r, settings.use_rslora = factor * config.rank, False
    settings.lora_alpha = config.scaling * settings.r
    settings.rank_pattern = {name: factor * rank for name, rank in settings.rank_pattern.items()}
    settings.alpha_pattern = {name: config.scaling * rank for name, rank in settings.rank_pattern.items()}
    model.__class__ = with_reference(type(model))
    model.astra_settings = config


@torch.no_grad()
def _set_plain(layer: LoraLayer, a0: torch.Tensor) -> None:
    """Let PEFT's own factors of a layer start at A0 and B = 0."""
    layer.lora_A[ADAPTER].weight.copy_(a0)
    nn.init.zeros_(layer.lora_B[ADAPTER].weight)


def saved_config(model: PeftModel, base: str) -> Json:
    """Return the config with which PEFT adapts the same layers of the base named `base` (see `trainer.experts`).

    Its ranks are those of A and B.
    """
    settings = model.peft_config[ADAPTER]
    modules, parameters = loadable_targets(model.get_base_model(), settings.target_modules)
    if expert_wrappers(model):
        names = names_of_experts(model.get_base_model())
        assert names is not None
        modules = sorted({*modules, *names.projections})  # what PEFT takes for the stacked parameters
    found: Json = {**settings.to_dict(), "base_model_name_or_path": base, "target_modules": modules}
    factor = 2 if any(is_pair(layer, ADAPTER) for layer in adapted_modules(model).values()) else 1
    of_factors: Json = {
        "r": settings.r // factor,
        "lora_alpha": settings.lora_alpha / factor,
        "rank_pattern": {name: rank // factor for name, rank in settings.rank_pattern.items()},
        "alpha_pattern": {name: alpha / factor for name, alpha in settings.alpha_pattern.items()},
    }
    return {**found, **of_factors, "target_parameters": parameters or None}


@torch.no_grad()
def adapter_layers(model: PeftModel, starts: Mapping[str, Start] = MappingProxyType({})) -> dict[str, AstraLayer]:
    """Return A, B, A0 and B0 of each adapted layer, by the layer's name in the base, on disk for experts.

    Where B started at zero, the change is s B A, wherever A started: A0 is that of `starts`, which the model does not
    hold, or zero.
    """
    layers = {}
    for name, layer in adapted_modules(model).items():
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        if has_start(layer, ADAPTER):
            layers[name] = AstraLayer(a=a.value, b=b.value, a0=a.start.clone(), b0=b.start.clone())
        else:
            a0 = starts[name].a0.to(a.weight) if name in starts else torch.zeros_like(a.weight)
            layers[name] = AstraLayer(a.weight.clone(), b.weight.clone(), a0, torch.zeros_like(b.weight))
    return layers | _expert_layers(model, starts)


def _expert_layers(model: PeftModel, starts: Mapping[str, Start]) -> dict[str, AstraLayer]:
    """Return the layers of `adapter_layers` that are of single experts."""
    layers: dict[str, AstraLayer] = {}
    names = names_of_experts(model.get_base_model())
    for name, wrapper in expert_wrappers(model.get_base_model()).items():
        assert names is not None
        rank, weight_a, weight_b = wrapper.r[ADAPTER], wrapper.lora_A[ADAPTER].weight, wrapper.lora_B[ADAPTER].weight
        a = weight_a.reshape(-1, rank, weight_a.shape[1])
        b = weight_b.reshape(len(weight_b), rank, -1).permute(2, 0, 1)  # PEFT's order: (d_out, r, experts)
        a0 = starts[name].a0.to(a) if name in starts else torch.zeros_like(a)
        initial = split_experts(names, name, a0, torch.zeros_like(b))
        for (layer, a_e, b_e), (_, a0_e, b0_e) in zip(split_experts(names, name, a, b), initial, strict=True):
            layers[layer] = AstraLayer(a=a_e, b=b_e, a0=a0_e, b0=b0_e)
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
