"""Mixtures of experts, and the names under which PEFT adapts their other layers.

transformers stacks the experts of a layer in two tensors: `experts.gate_up_proj` (experts, 2 x d_expert, d_model) and
`experts.down_proj` (experts, d_model, d_expert). In such models PEFT takes the names that the experts had one by one
(`gate_proj`, `up_proj`, `down_proj`; Mixtral's `w1`, `w2`, `w3`) for these tensors, although dense first layers and
shared experts have linear layers of the same names. PEFT adapts those where `target_parameters` names their weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ROUTER = ".gate.weight"  # what PEFT makes of the name of a router


def expert_tensors(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of elements of each parameter that holds several experts, by its name."""
    return {
        f"{name}.{part}": parameter.numel()
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__ and not isinstance(module, nn.Linear | Conv1D)
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def is_meant(name: str, target: str) -> bool:
    """Return whether a name of `target_modules` is this name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def taken_for_experts(model: nn.Module, leaves: Iterable[str]) -> set[str]:
    """Return those of the last parts of names that PEFT takes for stacked experts of `model`."""
    return {leaf for leaf in leaves if leaf not in (found := _targets(model, leaf)) and _ROUTER not in found}


def taken_for_routers(model: nn.Module, leaves: Iterable[str]) -> set[str]:
    """Return those of the last parts of names that PEFT takes for the router of `model`."""
    return {leaf for leaf in leaves if _ROUTER in _targets(model, leaf)}


def _targets(model: nn.Module, leaf: str) -> set[str]:
    """Return the modules that PEFT adapts under the name `leaf`, and the ends of parameters' names after a dot.

    There are none for half of a stacked tensor, which PEFT refuses alone.
    """
    settings = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(settings, model, None)
    except ValueError:  # one of two projections that are stacked in one tensor
        return set()
    return {*(settings.target_modules or ()), *(f".{name}" for name in settings.target_parameters or ())}


@contextmanager
def names_as_they_are(model: PreTrainedModel) -> Iterator[None]:
    """Let PEFT adapt the modules that a config names, whatever they were in older versions of transformers.

    PEFT looks the other meaning of the names up under the type of the model, which is hidden from it here.
    """
    kind = model.config.model_type
    model.config.model_type = ""
    try:
        yield
    finally:
        model.config.model_type = kind


def loadable_targets(model: nn.Module, targets: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the `target_modules` and the `target_parameters` with which PEFT adapts the linear layers `targets`.

    `targets` are names, or ends of names, of modules.
    """
    leaf_of = {target: target.rpartition(".")[2] for target in targets}
    taken = taken_for_experts(model, set(leaf_of.values()))
    modules = sorted(target for target, leaf in leaf_of.items() if leaf not in taken)
    return modules, sorted(f"{target}.weight" for target, leaf in leaf_of.items() if leaf in taken)
