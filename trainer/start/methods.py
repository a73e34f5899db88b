"""The initial A0 and B0 of every target layer, for each method.

Astra's start is computed from a subspace of the layer's outputs, MiLoRA's from an SVD of W. The other methods use the
initialisers of PEFT, on a copy of one layer at a time: PEFT subtracts B0 A0 from the weight, and the base must not
change. All methods then train in the same way.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import EvaConfig, LoraGAConfig, get_eva_state_dict, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import PreTrainedModel

from trainer.adapter import Start, peft_config, whole_weight
from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.targets import layer_shape, peft_targets

_PEFT_NAMES: dict[str, Any] = {"lora": True, "rslora": True}  # True: A random, B zero
_PEFT_ATTRIBUTES = ("eigens", "_peft_loraga_grad")  # results of PEFT's calibration, set on a layer for its initialiser


@torch.no_grad()
def astra_start(weight: torch.Tensor, q: torch.Tensor) -> Start:
    """Return A0 = Q^T W and B0 = Q for W (d_out, d_in) and Q (d_out, r) (paper section 3.2)."""
    return Start(a0=(q.to(weight.device).T @ weight.float()).cpu(), b0=q)


def other_starts(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    calibration: list[Batch],
    config: TrainConfig,
    on_layer: Callable[[], None],
) -> dict[str, Start]:
    """Return the start of each layer for `config.method`, any method but astra and full; call `on_layer` after each."""
    settings = peft_config(config, "", ranks, peft_targets(model, layers))
    settings.init_lora_weights = _PEFT_NAMES.get(config.method, config.method)
    eva_a0 = _calibrate(model, settings, calibration, config)
    starts = {}
    for name, layer in layers.items():
        if config.method == "milora":
            starts[name] = _milora(whole_weight(layer).float(), ranks[name], config.scaling)
        else:
            starts[name] = _peft_start(layer, settings, ranks[name], config.scaling)
        if name in eva_a0:
            starts[name] = Start(eva_a0[name].float().cpu(), starts[name].b0)
        for attribute in _PEFT_ATTRIBUTES:
            if hasattr(layer, attribute):
                delattr(layer, attribute)
        on_layer()
    return starts


def expert_starts(shapes: Mapping[str, tuple[int, int, int]], rank: int) -> dict[str, Start]:
    """Return LoRA's start of stacked experts of `shapes` (experts, d_out, d_in): A0 random as in PEFT, B0 zero."""
    found = {}
    for name, (experts, d_out, d_in) in shapes.items():
        a0 = torch.empty(experts * rank, d_in)
        nn.init.kaiming_uniform_(a0, a=math.sqrt(5))
        found[name] = Start(a0.view(experts, rank, d_in), torch.zeros(experts, d_out, rank))
    return found


def _calibrate(
    model: PreTrainedModel, settings: LoraConfig, calibration: list[Batch], config: TrainConfig
) -> Mapping[str, torch.Tensor]:
    """Run PEFT's calibration for the method, if it has one; return EVA's A0 (r, d_in) by layer name.

    The results for CorDA and LoRA-GA are attributes of the layers (see `_PEFT_ATTRIBUTES`).
    """
    device = model.device
    on_device = [{key: value.to(device) for key, value in batch.items()} for batch in calibration]

    def forward_row_by_row() -> None:  # CorDA does not support padding
        for batch in on_device:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])

    def backward() -> None:
        for batch in on_device:
            model(**batch).loss.backward()

    if config.method == "corda":
        settings.corda_config = CordaConfig(corda_method="ipm")
        preprocess_corda(model, settings, forward_row_by_row)
    elif config.method == "lora_ga":
        settings.lora_ga_config = LoraGAConfig()
        model.enable_input_require_grads()  # PEFT collects gradients only where a layer's input requires one
        preprocess_loraga(model, settings, backward)
        model.disable_input_require_grads()
        model.requires_grad_(False)
    elif config.method == "eva":
        settings.eva_config = EvaConfig(rho=1.0)  # equal ranks, as for the other methods
        found: Mapping[str, torch.Tensor] = get_eva_state_dict(model, on_device, settings, show_progress_bar=False)
        return found
    return {}


def _peft_start(layer: nn.Linear, settings: LoraConfig, rank: int, scaling: float) -> Start:
    """Return the start that PEFT's initialiser gives to a float32 copy of `layer`."""
    d_out, d_in = layer_shape(layer)
    copy = nn.Linear(d_in, d_out, bias=False)
    copy.weight = nn.Parameter(whole_weight(layer).float().cpu().contiguous().clone(), requires_grad=False)
    for attribute in _PEFT_ATTRIBUTES:
        if hasattr(layer, attribute):
            setattr(copy, attribute, getattr(layer, attribute))
    adapted = Linear(copy, "start", settings, r=rank, lora_alpha=scaling * rank)
    a0, b0 = adapted.lora_A["start"].weight, adapted.lora_B["start"].weight
    return Start(a0.detach().float().clone(), b0.detach().float().clone())


def _milora(weight: torch.Tensor, rank: int, scaling: float) -> Start:
    """Return the start of MiLoRA, the minor singular components of W (arXiv 2406.09044, section 3)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[-rank:] / scaling).sqrt()
    return Start((root[:, None] * vh[-rank:]).cpu(), (u[:, -rank:] * root).cpu())
