"""A LoRA on the base that it is served with: the base's names, and without the unchanged copies of its tensors.

Names differ between the models that can be made of one base. PEFT finds layers by the names of the model that was
trained, most often `AutoModelForCausalLM`'s: a LoRA for PEFT keeps the names of any such model, and gets those of the
language model where it has others. Engines know the names of the model that config.json names: a LoRA for an engine
gets those. They are the same but for a base such as Qwen3.5, whose language model is a model of its own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converter.adapter_dir.base import BaseModules, base_parameters
from converter.adapter_dir.errors import MalformedAdapter
from converter.adapter_dir.folder import CONFIG
from converter.adapter_dir.layers import Layers
from converter.adapter_dir.lora import LoraAdapter
from converter.adapter_dir.names import names_in_base, renamed

# Settings beside target_modules that say which layers are adapted; a list of all modules needs none.
RESTRICTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


@dataclass(frozen=True)
class FittedLora:
    """A LoRA with the names of a base."""

    lora: LoraAdapter
    names: dict[str, str]  # of its modules: by their names in the folder, those in the base
    dropped: list[str]  # tensors that equal those of the base; the LoRA is without them


def on_base(
    folder: Path, lora: LoraAdapter, base: Path, modules: BaseModules, *, for_engine: bool = False
) -> FittedLora:
    """Return the LoRA of `folder` with the names of the base in the folder `base`, for PEFT or for an engine.

    `modules` are those of the base. A tensor that is stored as a whole and equals the base's is dropped, read one at a
    time. Those that differ, and those that the base does not have, stay in `head` and `copies`. Raises WrongBase,
    BaseNotFound and MalformedAdapter.
    """
    models = _models(lora, modules, for_engine=for_engine)
    names = names_in_base(folder, lora.layers, models, modules.shapes)
    in_folder = {new: old for old, new in names.items()}
    full: dict[str, tuple[Mapping[str, torch.Tensor], str]] = {}
    for tensors in (lora.head, lora.copies):
        owners = {name.rpartition(".")[0] for name in tensors}
        in_base = names_in_base(folder, owners, models, modules.shapes)
        full |= {new: (tensors, old) for new, old in renamed({name: name for name in tensors}, in_base).items()}
    parameters: Mapping[str, torch.Tensor] = base_parameters(base) if full else {}
    there = ((name, tensors[old]) for name, (tensors, old) in full.items() if name in parameters)
    dropped = {name for name, tensor in there if _equals(tensor, parameters[name])}
    left = {name: where for name, where in full.items() if name not in dropped}

    def of(kind: Mapping[str, torch.Tensor]) -> Layers[torch.Tensor]:
        return Layers([n for n, (tensors, _) in left.items() if tensors is kind], lambda n: kind[left[n][1]])

    patterns = {
        key: {f"^{names.get(name.removeprefix('^'), name)}": value for name, value in (lora.config[key] or {}).items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    saved = lora.config.get("modules_to_save") if of(lora.head) else None
    config = {**lora.config, **patterns, "modules_to_save": saved}
    if not (config.get("target_modules") or config.get("target_parameters")) or any(
        old != new for old, new in names.items()
    ):
        config |= {"target_modules": list(in_folder), **dict.fromkeys(RESTRICTIONS)}
    layers = Layers(list(in_folder), lambda module: lora.layers[in_folder[module]])
    fitted = replace(lora, layers=layers, config=config, head=of(lora.head), copies=of(lora.copies))
    return FittedLora(fitted, names, sorted(dropped))


def _models(lora: LoraAdapter, modules: BaseModules, *, for_engine: bool) -> Sequence[Collection[str]]:
    """Return the models of which a LoRA may have the names, by their modules, in the order of preference."""
    if for_engine and modules.served:
        return [modules.served]
    trained = [model for model in modules.models if model.issuperset(lora.layers)]
    return trained[:1] or modules.models


def check_only_factors(folder: Path, lora: LoraAdapter) -> None:
    """Raise MalformedAdapter if the LoRA of `folder` has a trained tensor of the base beside its factors."""
    if lora.head and lora.config.get("task_type") == "SEQ_CLS":
        raise MalformedAdapter(
            f"{folder} is a classifier, whose head is trained in full: engines serve plain LoRA only"
        )
    if name := next(iter([*lora.head, *lora.copies]), None):
        saved = f"{folder / CONFIG} has modules_to_save, and " if lora.head else f"{folder}: "
        raise MalformedAdapter(
            f"{saved}{name!r} is no copy of the base's tensor: engines serve plain LoRA only; train "
            "lm_head as a target module of the LoRA, and no embedding"
        )


def _equals(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    """Return whether a tensor is the base's, rounded to the tensor's dtype."""
    return base.shape == tensor.shape and torch.equal(base.to(tensor.dtype), tensor)
