"""The names of tensors in adapter files, whatever tool wrote them, as modules of the base model.

    base_model.model.model.layers.0.q_proj.lora_A.weight            PEFT
    base_model.model.model.layers.0.q_proj.lora_A.default.weight    a raw state dict, with the adapter's name
    base_model.model.base_model.model.model.layers.0 ...            a model that was wrapped twice
    model.layers.0 ...                                              without PEFT's wrapper
    module. ... , ._orig_mod. ... , ._fsdp_wrapped_module. ...      a model of DDP, torch.compile, FSDP
    base_model.model.model.language_model.layers.0 ...              the text model of a multimodal one
    base_model.model.layers.0 ...                                   trained on the model without its output layer

The first five can be read without the base; the last two need the names of its modules. A base may have several: those
of its language model, of the multimodal model around it, and those on disk (see `on_base`).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from converter.adapter_dir.errors import MalformedAdapter, WrongBase

PEFT_PREFIX = "base_model.model."
MAX_NAME = 500  # characters; those of real models have about 100
MAX_SEGMENTS = 40
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Modules around the layers of a text model, which a checkpoint of another class of the same model has or has not.
_AROUND = ("base_model", "model", "language_model", "text_model", "transformer")


@dataclass(frozen=True)
class TensorNames:
    """The tensors of an adapter file by what they are."""

    parts: dict[str, dict[str, str]]  # by module and part, such as lora_A: the key in the file; sorted by module
    full: dict[str, str]  # by the name of a base's tensor that is stored as a whole: the key in the file


def read_names(folder: Path, keys: Iterable[str], parts: Iterable[str]) -> TensorNames:
    """Sort the tensors of an adapter file; `parts` are the names of a layer's parts, such as lora_A and lora_B.

    Raises MalformedAdapter for a tensor that is neither a part nor a weight or bias of the base, and where a file has
    two tensors for one part, such as those of two adapters.
    """
    found: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    adapters = set()
    known = set(parts)
    for key in keys:
        path = _without_wrappers(key)
        if len(key) > MAX_NAME or len(path) > MAX_SEGMENTS:  # each end of a name is compared with patterns
            raise MalformedAdapter(
                f"{folder}: tensor {key[:100]!r} has a longer name than any module: {len(key)} characters"
            )
        at = next((i for i, segment in enumerate(path) if segment in known), None)
        rest = [] if at is None else [segment for segment in path[at + 1 :] if segment != "weight"]
        if at and all(path[:at]) and len(rest) <= 1 and rest != ["bias"]:
            adapters |= {*rest}
            module, name = ".".join(path[:at]), path[at]
            target, shown = found.setdefault(module, {}), f"{module}.{name}"
        elif (name := _full_name(path)) and not any(
            segment.startswith(("lora_", "hada_", "lokr_")) for segment in path
        ):
            if "modules_to_save" in key and name in full:  # PEFT reads the one without
                continue
            if "modules_to_save" in full.get(name, ""):
                del full[name]
            target, shown = full, name
        elif "original_module" in path:  # the base's own, beside the one that PEFT trained
            continue
        else:
            raise MalformedAdapter(
                f"{folder}: tensor {key[:200]!r} is not a {' or '.join(sorted(known)[:2])} of a linear layer"
            )
        if name in target or len(adapters) > 1:
            names = f" ({', '.join(sorted(adapters))})"[:100] if len(adapters) > 1 else ""
            raise MalformedAdapter(f"{folder} has two adapters in one file{names}: {shown[:200]!r} is there twice")
        target[name] = key
    return TensorNames(dict(sorted(found.items())), full)


def names_in_base(
    folder: Path, modules: Iterable[str], models: Iterable[Collection[str]], known: Collection[str]
) -> dict[str, str]:
    """Return the base's name of each module of an adapter; a module that the base does not have keeps its name.

    Names are the same where they differ only in the modules around the layers, such as `language_model`. Of the
    `models` of the base, whose modules are given, the one that has most of the adapter's modules names them; then the
    others; then all names that are `known` of the base, where it has one such name. Raises WrongBase where two modules
    would be one of the base.
    """
    modules = list(modules)
    tails = {module: _tail(module) for module in modules}
    by_tail = sorted(map(_by_tail, models), key=lambda names: -sum(tail in names for tail in tails.values()))
    of_all = _by_tail(known)
    found: dict[str, str] = {}
    for module, tail in tails.items():
        same = next((names[tail] for names in by_tail if len(names.get(tail, ())) == 1), None)
        if same is None:
            same = [module] if module in known else of_all.get(tail, [])
        found[module] = same[0] if len(same) == 1 else module
    if len(set(found.values())) != len(found):
        twice = next(name for name in found.values() if list(found.values()).count(name) > 1)
        raise WrongBase(f"{folder} has two layers for {twice!r} of this base: its names mix two models")
    return found


def renamed(names: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """Return `names` of tensors (module.weight) by their names in the base; `base` maps modules."""
    return {_join(base, name): key for name, key in names.items()}


def _join(base: Mapping[str, str], name: str) -> str:
    module, dot, last = name.rpartition(".")
    return f"{base.get(module, module)}{dot}{last}"


def _without_wrappers(key: str) -> list[str]:
    path = [segment for segment in key.split(".") if segment not in _WRAPPERS]
    while path[:1] == ["module"] or path[:2] == ["base_model", "model"]:
        path = path[1:] if path[0] == "module" else path[2:]
    return path


def _full_name(path: list[str]) -> str:
    """Return the name of a base's tensor that is stored as a whole; "" for any other."""
    if len(path) < 2 or path[-1] not in ("weight", "bias") or "original_module" in path:
        return ""
    if "modules_to_save" in path:  # lm_head.modules_to_save.default.weight
        at = path.index("modules_to_save")
        return ".".join([*path[:at], *path[at + 2 if len(path) - at > 2 else at + 1 :]])
    return ".".join(segment for segment in path if segment != "base_layer")


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_tail(name), []).append(name)
    return found


def _tail(name: str) -> str:
    path = name.split(".")
    at = next((i for i, segment in enumerate(path) if segment not in _AROUND), len(path))
    return ".".join(path[at:])
