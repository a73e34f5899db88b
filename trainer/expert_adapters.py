"""Adapters of stacked experts: which are trained, and the same change as one LoRA for each expert.

PEFT holds one LoRA for each parameter of a layer's experts (`target_parameters`): A_e (r, d_in) and B_e (d_out, r) of
every expert e, where `gate_up_proj` has the outputs of gate and up one after the other. What is written has, for each
expert, the layers that the base's checkpoint has: gate and up share A_e, and each has its half of B_e. vLLM loads
experts in this form alone, and PEFT stacks them again.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from trainer.config import TrainConfig
from trainer.errors import TargetError
from trainer.experts import expert_tensors, is_meant, taken_for_experts

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_METHODS = ("lora", "rslora")
_LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # names of gate, up and down in checkpoints
_SEGMENT = re.compile(r"\.\w+\.")


@dataclass(frozen=True)
class ExpertNames:
    """The names of a model's experts in its checkpoint."""

    projections: tuple[str, str, str]  # of gate, up and down
    renamed: Mapping[str, str]  # parts of names in the loaded model, and what they are in the checkpoint

    def of(self, module: str, expert: int, projection: str) -> str:
        """Return the name of one projection of one expert of the loaded model's `module`."""
        name = f".{module}."
        for loaded, stored in self.renamed.items():
            name = name.replace(loaded, stored)
        return f"{name[1:]}{expert}.{projection}"


def names_of_experts(model: PreTrainedModel) -> ExpertNames | None:
    """Return the names of the experts, or None where they cannot be trained.

    That is where the checkpoint does not have each expert by itself, where experts have other parts than gate, up and
    down, where PEFT does not know the names of this architecture, and in multimodal models, of which vLLM loads experts
    in other forms.
    """
    if model.config.get_text_config() is not model.config:
        return None
    parts = {name.rpartition(".")[2] for name in expert_tensors(model)}
    rules = get_model_conversion_mapping(model)
    sources = [s for rule in rules if isinstance(rule, WeightConverter) for s in rule.source_patterns]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    pairs = [(rule.target_patterns[0], rule.source_patterns[0]) for rule in renamings]
    for names in _LAYOUTS:
        is_stored = all(any(s.endswith(f"experts.*.{name}.weight") for s in sources) for name in names)
        if is_stored and parts == {GATE_UP, DOWN} and {*names} <= taken_for_experts(model, names):
            return ExpertNames(names, {a: b for a, b in pairs if _SEGMENT.fullmatch(a) and _SEGMENT.fullmatch(b)})
    return None


def chosen_experts(model: PreTrainedModel, config: TrainConfig) -> dict[str, tuple[int, int, int]]:
    """Return (experts, d_out, d_in) of each stacked parameter to train, by its name: of all experts or of none.

    They are trained where `config.target_modules` names their modules, such as `experts`. Raises TargetError.
    """
    named = expert_targets(model, config)
    if not named:
        return {}
    modules = _modules(model)
    missing = [module for module in modules if not any(is_meant(module, target) for target in named)]
    if missing:
        raise TargetError(f"target_modules: experts are adapted in all layers, or in none: {missing[0]!r} is not named")
    if names_of_experts(model) is None:
        raise TargetError(
            f"target_modules: the experts of {model.config.model_type} cannot be adapted: PEFT or the engine could not "
            "load them; name linear layers"
        )
    if config.method not in _METHODS:
        raise TargetError(
            f"target_modules: experts start as plain LoRA: {config.method} needs the outputs of each expert; "
            "set method=lora, or name linear layers"
        )
    if config.shard_base:
        raise TargetError("target_modules: experts cannot be adapted with shard_base: each process needs them whole")
    parameters = dict(model.named_parameters())
    found = {name: tuple(parameters[name].shape) for name in expert_tensors(model)}
    for name, shape in found.items():
        if config.rank > min(shape[1:]):
            raise TargetError(f"rank {config.rank} is larger than an expert of {name} {shape[1:]}: lower rank")
    return found


def expert_targets(model: PreTrainedModel, config: TrainConfig) -> list[str]:
    """Return those of the names in `config.target_modules` that mean stacked experts."""
    if config.target_modules == "all-linear":
        return []
    modules = _modules(model)
    return [target for target in config.target_modules if any(is_meant(module, target) for module in modules)]


def expert_wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """Return PEFT's wrappers of stacked parameters, by the names of the parameters in the base."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            inside = name.replace(".base_layer", "")  # several parameters of one module are wrapped one in another
            found[f"{inside}.{module.parameter_name}"] = module
    return found


def split_experts(
    names: ExpertNames, parameter: str, a: torch.Tensor, b: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the name, A (r, d_in) and B of each projection of each expert.

    `a` (experts, r, d_in) and `b` (experts, d_out, r) are those of a stacked parameter.
    """
    module, _, kind = parameter.rpartition(".")
    gate, up, down = names.projections
    for expert, (a_e, b_e) in enumerate(zip(a, b, strict=True)):
        parts = zip((gate, up), b_e.chunk(2), strict=True) if kind == GATE_UP else [(down, b_e)]
        for projection, part in parts:
            yield names.of(module, expert, projection), a_e.clone(), part.clone()


def _modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules of stacked experts."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in expert_tensors(model)))
