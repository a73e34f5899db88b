"""A LoRA folder in PEFT's layout: the converter writes it, servers read it, and other tools may have written it."""

import math
import os
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
MAX_RANK = 4096
# The values that vLLM accepts as --max-lora-rank (vllm.config.lora.MaxLoRARanks); it pads every adapter to that rank.
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PICKLED_WEIGHTS = "adapter_model.bin"
_PEFT_PREFIX = "base_model.model."
_FACTORS = ("lora_A", "lora_B")
_PATTERNS: dict[str, tuple[type, ...]] = {"rank_pattern": (int,), "alpha_pattern": (int, float)}  # types of values
# Extensions of LoRA that PEFT supports and servers do not, with the value that switches each off.
_UNSUPPORTED = {
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
    """A standard LoRA: lora_A (k, d_in) and lora_B (d_out, k) by module name, delta W = scaling lora_B lora_A."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    config: Json
    provenance: Json
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of lora_B lora_A in PEFT: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        alpha: float = pattern_value(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class LoraHeader:
    """The properties of a LoRA folder that can be read without its weights."""

    rank: int
    shapes: dict[str, tuple[int, int]]  # module: (d_out, d_in)
    base_digest: str | None  # None if the adapter does not record its base
    patterns: list[str]  # the keys of rank_pattern and alpha_pattern
    unmatched: list[str]  # those of them that match no module of the adapter: PEFT ignores them


def save_lora(folder: Path, adapter: LoraAdapter, *, on_layer: Callable[[], None] = lambda: None) -> None:
    """Write a LoRA in PEFT's layout into the existing `folder` (see `new_folder`), one layer in memory at a time.

    `on_layer` is called after each layer. Raises CannotWrite and OSError.
    """

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for module, factors in adapter.layers.items():
            for name, factor in zip(_FACTORS, factors, strict=True):
                yield f"{_PEFT_PREFIX}{module}.{name}.weight", factor
            on_layer()
        for name, tensor in adapter.head.items():
            yield f"{_PEFT_PREFIX}{name}", tensor

    names = [f"{_PEFT_PREFIX}{module}.{factor}.weight" for module in adapter.layers for factor in _FACTORS]
    names += [f"{_PEFT_PREFIX}{name}" for name in adapter.head]
    write_tensors(folder / LORA_WEIGHTS, names, tensors(), {"format": "pt"})
    write_json(folder / CONFIG, {"peft_type": "LORA", **adapter.config})
    save_lora_provenance(folder, adapter.provenance)


def save_lora_provenance(folder: Path, provenance: Json) -> None:
    """Write or replace `astra.json`, the provenance of the LoRA in `folder`."""
    write_json(folder / PROVENANCE, {"format": LORA_FORMAT, **provenance})


def load_lora(folder: Path, *, allow_pickle: bool = False) -> LoraAdapter:
    """Check a LoRA folder and return it; a layer's numbers are read and checked, in their own dtype, when accessed.

    The provenance is empty unless `astra-convert` wrote it. With `allow_pickle`, adapter_model.bin is read if there is
    no safetensors file: by PyTorch's weights-only unpickler, all layers at once. Raises NotAnAdapter, UnsafeAdapter and
    MalformedAdapter.
    """
    config = _checked_config(folder)
    file = _open(folder, allow_pickle)
    shapes, keys, head = _layers(folder, config, file.shapes)
    for module, shape in shapes.items():
        expected = pattern_value(config.get("rank_pattern"), module, config["r"])
        if shape.rank != expected:
            raise MalformedAdapter(f"{folder}: {module!r} has rank {shape.rank}, but {CONFIG} says {expected}")
    return LoraAdapter(
        Layers(list(keys), lambda module: (file[keys[module]["lora_A"]], file[keys[module]["lora_B"]])),
        config,
        _provenance(folder),
        Layers(list(head), lambda name: file[head[name]]),
    )


def read_lora_header(folder: Path) -> LoraHeader:
    """Return the header of a LoRA folder, after checking that an engine can serve the adapter; reads no weights.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    if (folder / "astra_weights.safetensors").is_file():
        raise NotAnAdapter(f"{folder} is an Astra adapter: convert it first (astra-convert {folder} OUT_DIR)")
    config = _checked_config(folder)
    if config.get("modules_to_save"):
        raise MalformedAdapter(
            f"{folder / CONFIG} has modules_to_save={_short(config['modules_to_save'])}: engines serve plain LoRA only"
        )
    shapes, _, head = _layers(folder, config, TensorFile(folder, LORA_WEIGHTS).shapes)
    if head:
        name = next(iter(head))
        raise MalformedAdapter(f"{folder / LORA_WEIGHTS}: {name!r} is no LoRA factor: engines serve plain LoRA only")
    base = _provenance(folder).get("base")
    # The engine reads the rank from the config, not from the tensors.
    rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), *(shape.rank for shape in shapes.values()))
    digest = base.get("digest") if isinstance(base, dict) and isinstance(base.get("digest"), str) else None
    patterns = [key for name in _PATTERNS for key in config.get(name) or {}]
    matched = {key for module in shapes for key in _keys_of(module)}
    unmatched = [key for key in patterns if key not in matched]
    found = {module: (shape.d_out, shape.d_in) for module, shape in shapes.items()}
    return LoraHeader(rank, found, digest, patterns, unmatched)


def lora_shapes(folder: Path, *, allow_pickle: bool = False) -> dict[str, Shape]:
    """Return the shape of every layer of a LoRA folder; reads only the header of a safetensors file.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    return _layers(folder, _checked_config(folder), _open(folder, allow_pickle).shapes)[0]


def lora_digest(folder: Path) -> str:
    """Return the digest of a LoRA's weights and config, as `sha256:...`. Raises NotAnAdapter and UnsafeAdapter."""
    weights = LORA_WEIGHTS if (folder / LORA_WEIGHTS).exists() else _PICKLED_WEIGHTS
    return digest([file_in(folder, weights), file_in(folder, CONFIG)])


def check_base(folder: Path, recorded_digest: str | None, digest: str) -> None:
    """Raise WrongBase if the adapter in `folder` records a base whose digest differs from `digest`."""
    if recorded_digest is not None and recorded_digest != digest:
        raise WrongBase(
            f"{folder} was trained on another base ({recorded_digest[:19]}..., this one is {digest[:19]}...)"
        )


def check_shapes(folder: Path, shapes: Mapping[str, tuple[int, int]], base: Mapping[str, tuple[int, int]]) -> None:
    """Raise WrongBase if a module of the adapter is missing in the base or has another (d_out, d_in) there."""
    for module, shape in shapes.items():
        if base.get(module) != shape:
            in_base = base.get(module, "missing")
            raise WrongBase(
                f"{folder} does not fit this base: {module!r} is {shape} in the adapter, {in_base} in the base"
            )


def check_config(folder: Path, config: Json) -> None:
    """Raise MalformedAdapter unless r, lora_alpha, rank_pattern and alpha_pattern have values that PEFT could write.

    PEFT evaluates the keys of patterns as regular expressions, but matching an untrusted expression can take forever: a
    key must be a plain name.
    """
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise MalformedAdapter(f"{folder / CONFIG} needs r, an integer from 1 to {MAX_RANK}, not {str(rank)[:20]}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e9:
        raise MalformedAdapter(f"{folder / CONFIG} needs lora_alpha, a positive number, not {str(alpha)[:20]}")
    for key, kinds in _PATTERNS.items():
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(type(v) in kinds and 0 < v < 1e9 for v in pattern.values()):
            raise MalformedAdapter(f"{folder / CONFIG}: {key} must map module names to positive numbers")
        if other := next((name for name in pattern if not re.fullmatch(r"\^?[\w.-]{1,500}", name)), None):
            raise MalformedAdapter(
                f"pattern {other[:100]!r} in {folder / CONFIG} is a regular expression: give module names"
            )


def scaling_of(config: Json) -> float:
    """Return the scaling of a LoraConfig without patterns: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    rank: int = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of PEFT's rank_pattern or alpha_pattern for `module`; `default` if no key matches.

    The first key counts that equals the module's name or its end after a dot; a key with a leading ^ must equal the
    whole name.
    """
    keys = _keys_of(module)
    return next((value for key, value in (pattern or {}).items() if key in keys), default)


def _keys_of(module: str) -> set[str]:
    """Return the keys of patterns that match a module."""
    parts = module.split(".")
    return {f"^{module}", *(".".join(parts[i:]) for i in range(len(parts)))}


def _checked_config(folder: Path) -> Json:
    config = read_json(folder, CONFIG)
    check_config(folder, config)
    if config.get("peft_type") != "LORA":  # PEFT refuses a config without it
        found = str(config.get("peft_type"))[:40]
        raise MalformedAdapter(f"{folder / CONFIG} has peft_type={found!r}: engines serve plain LoRA only, 'LORA'")
    for key, off in _UNSUPPORTED.items():
        if config.get(key) not in (off, None, [], {}):
            raise MalformedAdapter(f"{folder / CONFIG} has {key}={_short(config[key])}: engines serve plain LoRA only")
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
    """Return the shape of every layer, its factors' keys in the file, and the keys of a head's tensors, all by name."""
    keys: dict[str, dict[str, str]] = {}
    head = {}
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise MalformedAdapter(f"{folder / CONFIG}: modules_to_save must be a list of names")
    for key in shapes:
        name = key.removeprefix(_PEFT_PREFIX)
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        if module and factor in _FACTORS:
            keys.setdefault(module, {})[factor] = key
        elif any(f".{part}." in f".{name}" for part in saved):
            head[name] = key
        else:
            raise MalformedAdapter(f"{folder}: tensor {key[:200]!r} is not a lora_A or lora_B of a linear layer")
    found = {}
    for module, factors in sorted(keys.items()):
        if len(factors) != 2:
            raise MalformedAdapter(f"{folder}: {module!r} has only one of lora_A and lora_B")
        a, b = (shapes[factors[factor]] for factor in _FACTORS)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not 0 < a[0] <= MAX_RANK or 0 in (a[1], b[0]):
            raise MalformedAdapter(f"{folder}: {module!r}: lora_A is {a}, lora_B is {b}, not (r, d_in), (d_out, r)")
        found[module] = Shape(b[0], a[1], a[0])
    if not found:
        raise MalformedAdapter(f"{folder} contains no LoRA")
    return found, dict(sorted(keys.items())), head


def _provenance(folder: Path) -> Json:
    found = read_json(folder, PROVENANCE) if os.path.lexists(folder / PROVENANCE) else {}
    return found if found.get("format") == LORA_FORMAT else {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
