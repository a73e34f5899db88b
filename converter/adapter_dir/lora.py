"""A LoRA folder in PEFT's layout: what the converter writes, what servers read, and what other people bring."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from converter.adapter_dir.errors import MalformedAdapter, NotAnAdapter, UnsafeAdapter, WrongBase
from converter.adapter_dir.folder import CONFIG, PROVENANCE, Json, digest, file_in, read_json, write_json
from converter.adapter_dir.layers import Layers, Shape
from converter.adapter_dir.tensors import PickledTensors, TensorFile, write_tensors

LORA_WEIGHTS = "adapter_model.safetensors"
LORA_FORMAT = "astra-lora/1"
LARGEST_RANK = 4096
# What vLLM accepts as its maximum rank (vllm.config.lora.MaxLoRARanks); every adapter is padded to it.
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PICKLED_WEIGHTS = "adapter_model.bin"
_PEFT_PREFIX = "base_model.model."
_HALVES = ("lora_A", "lora_B")
# What PEFT can do beyond a plain LoRA, and no server does: the value that switches each off.
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "target_parameters": None,
}


@dataclass(frozen=True)
class LoraAdapter:
    """A standard LoRA: per module lora_A (k, d_in) and lora_B (d_out, k), delta W = scaling lora_B lora_A."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    config: Json
    provenance: Json
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def scaling(self, module: str, rank: int) -> float:
        """Return what PEFT multiplies the product of a module's factors with."""
        alpha: float = matching(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class LoraHeader:
    """What a LoRA folder is, read without its weights."""

    rank: int
    shapes: dict[str, tuple[int, int]]  # module: (d_out, d_in)
    base_digest: str | None  # None where the adapter does not record its base


def save_lora(folder: Path, adapter: LoraAdapter, *, on_layer: Callable[[], None] = lambda: None) -> None:
    """Write a LoRA in PEFT's layout into `folder` (see `new_folder`), one layer in memory at a time."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for module, factors in adapter.layers.items():
            for half, factor in zip(_HALVES, factors, strict=True):
                yield f"{_PEFT_PREFIX}{module}.{half}.weight", factor
            on_layer()
        for name, tensor in adapter.head.items():
            yield f"{_PEFT_PREFIX}{name}", tensor

    names = [f"{_PEFT_PREFIX}{module}.{half}.weight" for module in adapter.layers for half in _HALVES]
    names += [f"{_PEFT_PREFIX}{name}" for name in adapter.head]
    write_tensors(folder / LORA_WEIGHTS, names, tensors(), {"format": "pt"})
    write_json(folder / CONFIG, adapter.config)
    save_lora_provenance(folder, adapter.provenance)


def save_lora_provenance(folder: Path, provenance: Json) -> None:
    """Write, or write again, where the LoRA in `folder` came from."""
    write_json(folder / PROVENANCE, {"format": LORA_FORMAT, **provenance})


def load_lora(folder: Path, *, allow_pickle: bool = False) -> LoraAdapter:
    """Check a LoRA folder and return it; each layer's numbers are read, in their own dtype, when they are asked for.

    Its provenance is empty where it is not ours. With `allow_pickle` a .bin file is read where there is no other: by
    PyTorch's restricted unpickler, and at once. Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    config = _checked_config(folder)
    file = _open(folder, allow_pickle)
    shapes, keys, head = _layers(folder, config, file.shapes)
    for module, shape in shapes.items():
        expected = matching(config.get("rank_pattern"), module, config["r"])
        if shape.rank != expected:
            raise MalformedAdapter(f"{folder}: {module!r} has rank {shape.rank}, but {CONFIG} says {expected}")
        matching(config.get("alpha_pattern"), module, 0)
    return LoraAdapter(
        Layers(list(keys), lambda module: (file[keys[module]["lora_A"]], file[keys[module]["lora_B"]])),
        config,
        _provenance(folder),
        Layers(list(head), lambda name: file[head[name]]),
    )


def read_lora_header(folder: Path) -> LoraHeader:
    """Read and check what a LoRA folder is without reading its weights, and that an engine can serve it.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    if (folder / "astra_weights.safetensors").is_file():
        raise NotAnAdapter(f"{folder} is an Astra adapter: convert it first (astra-convert {folder} OUT_DIR)")
    config = _checked_config(folder)
    if config.get("modules_to_save"):
        raise MalformedAdapter(
            f"{folder / CONFIG} has modules_to_save={config['modules_to_save']!r}: the engine serves plain LoRA only"
        )
    shapes, _, head = _layers(folder, config, TensorFile(folder, LORA_WEIGHTS).shapes)
    if head:
        raise MalformedAdapter(f"{folder / LORA_WEIGHTS}: {next(iter(head))!r} is no LoRA: the engine serves that only")
    base = _provenance(folder).get("base")
    # The engine sizes its slots by what the config says, whatever the tensors are.
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), *(shape.rank for shape in shapes.values()))
    digest = base.get("digest") if isinstance(base, dict) and isinstance(base.get("digest"), str) else None
    return LoraHeader(rank, {module: (shape.d_out, shape.d_in) for module, shape in shapes.items()}, digest)


def lora_shapes(folder: Path, *, allow_pickle: bool = False) -> dict[str, Shape]:
    """Return the shape of every layer of a LoRA folder, from its header alone."""
    return _layers(folder, _checked_config(folder), _open(folder, allow_pickle).shapes)[0]


def lora_digest(folder: Path) -> str:
    """Return the digest of a LoRA's content: its weights and its config."""
    weights = LORA_WEIGHTS if (folder / LORA_WEIGHTS).exists() else _PICKLED_WEIGHTS
    return digest([file_in(folder, weights), file_in(folder, CONFIG)])


def check_base(folder: Path, recorded_digest: str | None, digest: str) -> None:
    """Raise WrongBase when the adapter in `folder` records another base than the one with `digest`."""
    if recorded_digest is not None and recorded_digest != digest:
        raise WrongBase(
            f"{folder} was trained on another base ({recorded_digest[:19]}..., this one is {digest[:19]}...)"
        )


def check_shapes(folder: Path, shapes: Mapping[str, tuple[int, int]], base: Mapping[str, tuple[int, int]]) -> None:
    """Raise WrongBase when a module of the adapter is not in the base or has another shape there."""
    for module, shape in shapes.items():
        if base.get(module) != shape:
            there = base.get(module, "no such layer")
            raise WrongBase(
                f"{folder} does not fit this base: {module!r} is {shape} in the adapter, {there} in the base"
            )


def check_config(folder: Path, config: Json) -> None:
    """Raise MalformedAdapter unless rank and alpha are what PEFT would write."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= LARGEST_RANK:
        raise MalformedAdapter(f"{folder / CONFIG} needs r, an integer from 1 to {LARGEST_RANK}, not {str(rank)[:20]}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e9:
        raise MalformedAdapter(f"{folder / CONFIG} needs lora_alpha, a positive number, not {str(alpha)[:20]}")
    for key, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(type(v) in kinds and 0 < v < 1e9 for v in pattern.values()):
            raise MalformedAdapter(f"{folder / CONFIG}: {key} must map module names to positive numbers")


def scaling_of(config: Json) -> float:
    """Return the scaling s that a LoraConfig gives every layer of rank r."""
    rank: int = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def matching(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """Return what PEFT's rank_pattern or alpha_pattern says of a module: the first name that it is or ends with.

    PEFT takes the names for regular expressions. These come from elsewhere and can take for ever: only plain names,
    with PEFT's leading ^ for a whole name, are understood. Raises MalformedAdapter for others.
    """
    for key, value in (pattern or {}).items():
        if not re.fullmatch(r"\^?[\w.-]{1,500}", key):
            raise MalformedAdapter(f"pattern {key[:100]!r} in {CONFIG} is a regular expression: give module names")
        if module == key.removeprefix("^") or module.endswith(f".{key}"):
            return value
    return otherwise


def _checked_config(folder: Path) -> Json:
    config = read_json(folder, CONFIG)
    check_config(folder, config)
    for key, plain in _PLAIN.items():
        if config.get(key) not in (plain, None, [], {}):
            raise MalformedAdapter(f"{folder / CONFIG} has {key}={config[key]!r}: engines serve plain LoRA only")
    return config


def _open(folder: Path, allow_pickle: bool) -> TensorFile | PickledTensors:
    if (folder / LORA_WEIGHTS).exists() or not (folder / _PICKLED_WEIGHTS).is_file():
        return TensorFile(folder, LORA_WEIGHTS)
    if not allow_pickle:
        raise UnsafeAdapter(
            f"{folder / _PICKLED_WEIGHTS} is a pickle, which can run code: astra-convert --allow-pickle reads it"
        )
    return PickledTensors(folder, _PICKLED_WEIGHTS)


def _layers(
    folder: Path, config: Json, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Shape], dict[str, dict[str, str]], dict[str, str]]:
    """Return the layers' shapes, the names of their halves in the file, and those of a head's tensors, by name."""
    keys: dict[str, dict[str, str]] = {}
    head = {}
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise MalformedAdapter(f"{folder / CONFIG}: modules_to_save must be a list of names")
    for key in shapes:
        name = key.removeprefix(_PEFT_PREFIX)
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if module and half in _HALVES:
            keys.setdefault(module, {})[half] = key
        elif any(f".{part}." in f".{name}" for part in saved):
            head[name] = key
        else:
            raise MalformedAdapter(f"{folder}: tensor {key[:200]!r} is no lora_A or lora_B of a linear layer")
    found = {}
    for module, halves in sorted(keys.items()):
        if len(halves) != 2:
            raise MalformedAdapter(f"{folder}: {module!r} has a {next(iter(halves))} without its other half")
        a, b = (shapes[halves[half]] for half in _HALVES)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not 0 < a[0] <= LARGEST_RANK or 0 in (a[1], b[0]):
            raise MalformedAdapter(f"{folder}: {module!r} is no matching lora_A and lora_B: {a} and {b}")
        found[module] = Shape(b[0], a[1], a[0])
    if not found:
        raise MalformedAdapter(f"{folder} holds no LoRA")
    return found, dict(sorted(keys.items())), head


def _provenance(folder: Path) -> Json:
    found = read_json(folder, PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    return found if found.get("format") == LORA_FORMAT else {}
