"""A LoRA folder in PEFT's layout: the converter writes it, servers read it, and other tools may have written it."""

import codecs
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converter.adapter_dir.errors import MalformedAdapter, WrongBase
from converter.adapter_dir.folder import CONFIG, PROVENANCE, Json, digest, read_json, write_json
from converter.adapter_dir.layers import Layers, Shape
from converter.adapter_dir.lora_config import FACTORS, LORA, MAX_RANK, resolved, short, unmatched_keys
from converter.adapter_dir.names import PEFT_PREFIX
from converter.adapter_dir.opened import LORA_WEIGHTS, OpenedAdapter, adapter_files, open_adapter
from converter.adapter_dir.patterns import pattern_value
from converter.adapter_dir.tensors import TensorFile, write_tensors

LORA_FORMAT = "astra-lora/1"
# The values that vLLM accepts as --max-lora-rank (vllm.config.lora.MaxLoRARanks); it pads every adapter to that rank.
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class LoraAdapter:
    """A standard LoRA: lora_A (k, d_in) and lora_B (d_out, k) by module name, delta W = scaling lora_B lora_A."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    config: Json  # the keys of its patterns are names of modules, as `pattern_value` reads them
    provenance: Json
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the tensors of modules_to_save, stored as a whole
    copies: Mapping[str, torch.Tensor] = field(default_factory=dict)  # other tensors of the base that the file has

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
    unmatched: list[str]  # those of them that decide for no module of the adapter: PEFT ignores them


def save_lora(folder: Path, adapter: LoraAdapter, *, on_layer: Callable[[], None] = lambda: None) -> None:
    """Write a LoRA in PEFT's layout into the existing `folder` (see `new_folder`), one layer in memory at a time.

    `on_layer` is called after each layer. Raises CannotWrite and OSError.
    """

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for module, factors in adapter.layers.items():
            for name, factor in zip(FACTORS, factors, strict=True):
                yield f"{PEFT_PREFIX}{module}.{name}.weight", factor
            on_layer()
        for name, tensor in adapter.head.items():
            yield f"{PEFT_PREFIX}{name}", tensor

    names = [f"{PEFT_PREFIX}{module}.{factor}.weight" for module in adapter.layers for factor in FACTORS]
    names += [f"{PEFT_PREFIX}{name}" for name in adapter.head]
    write_tensors(folder / LORA_WEIGHTS, names, tensors(), {"format": "pt"})
    save_lora_config(folder, adapter.config)
    save_lora_provenance(folder, adapter.provenance)


def save_lora_config(folder: Path, config: Json) -> None:
    """Write the config of a LoRA into `folder`."""
    write_json(folder / CONFIG, {"peft_type": LORA, **config})


def save_lora_provenance(folder: Path, provenance: Json) -> None:
    """Write or replace `astra.json`, the provenance of the LoRA in `folder`."""
    write_json(folder / PROVENANCE, {"format": LORA_FORMAT, **provenance})


def load_lora(folder: Path, *, allow_pickle: bool = False) -> LoraAdapter:
    """Check a LoRA folder and return it; a layer's numbers are read and checked, in their own dtype, when accessed.

    Its modules have the names of the folder's own base; `on_base` gives them those of another class of the same model.
    Patterns of its config are resolved to numbers. The provenance is empty unless `astra-convert` wrote it. For pickles
    see `open_adapter`. Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    return lora_from(_opened_lora(folder, allow_pickle))


def lora_from(opened: OpenedAdapter) -> LoraAdapter:
    """Return the LoRA of an opened folder; of a DoRA, that of its factors. Raises as `load_lora`."""
    tensors, parts = opened.tensors, opened.names.parts
    ranks = {module: shape.rank for module, shape in opened_shapes(opened).items()}
    return LoraAdapter(
        Layers(list(parts), lambda module: (tensors[parts[module]["lora_A"]], tensors[parts[module]["lora_B"]])),
        resolved(opened.folder, opened.config, ranks),
        _provenance(opened.folder),
        *full_tensors(opened),
    )


def full_tensors(opened: OpenedAdapter) -> tuple[Layers[torch.Tensor], Layers[torch.Tensor]]:
    """Return the tensors of an adapter that are stored as a whole: those of modules_to_save, and all others."""
    saved, full = opened.config.get("modules_to_save") or [], opened.names.full
    head = [name for name in full if any(f".{module}." in f".{name}" for module in saved)]
    others = [name for name in full if name not in head]

    def read(name: str) -> torch.Tensor:
        return opened.tensors[full[name]]

    return Layers(head, read), Layers(others, read)


def read_lora_header(folder: Path) -> LoraHeader:
    """Return the header of a LoRA folder, which has no other tensors than LoRA factors unless they copy the base's.

    Reads no weights. Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    opened = _opened_lora(folder, allow_pickle=False)
    shapes = opened_shapes(opened)
    resolved(folder, opened.config, {module: shape.rank for module, shape in shapes.items()})
    base = _provenance(folder).get("base")
    digest = base.get("digest") if isinstance(base, dict) and isinstance(base.get("digest"), str) else None
    return LoraHeader(
        max(shape.rank for shape in shapes.values()),
        {module: (shape.d_out, shape.d_in) for module, shape in shapes.items()},
        digest,
        [key for name in ("rank_pattern", "alpha_pattern") for key in opened.config.get(name) or {}],
        unmatched_keys(folder, opened.config, list(shapes)),
    )


def lora_shapes(folder: Path, *, allow_pickle: bool = False) -> dict[str, Shape]:
    """Return the shape of every layer of a LoRA folder; reads only the header of a safetensors file.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    return opened_shapes(_opened_lora(folder, allow_pickle))


def is_plainly_written(folder: Path) -> bool:
    """Return whether every LoRA server reads this folder, which `load_lora` reads, as PEFT does.

    There are one safetensors file with PEFT's names and nothing beside LoRA factors, and a config with
    r and lora_alpha as numbers, without patterns and without a byte order mark.
    """
    config = read_json(folder, CONFIG)
    opened = open_adapter(folder)
    return (
        _has_peft_names(opened)
        and type(config["r"]) is int
        and config["r"] == max(shape.rank for shape in opened_shapes(opened).values())
        and not any(config.get(name) for name in ("rank_pattern", "alpha_pattern", "modules_to_save"))
        and not (folder / CONFIG).read_bytes().startswith(codecs.BOM_UTF8)
    )


def write_plainly(folder: Path, lora: LoraAdapter, out: Path) -> None:
    """Write `lora`, which was read from `folder`, into the existing folder `out` such that every LoRA server reads it.

    Its config has numbers in place of patterns. The weights are the same file (a hard link) if they have PEFT's names
    already. Raises CannotWrite and OSError.
    """
    opened = open_adapter(folder)
    if _has_peft_names(opened) and opened.names.parts.keys() == {*lora.layers}:
        (out / LORA_WEIGHTS).hardlink_to(folder / LORA_WEIGHTS)
        save_lora_config(out, lora.config)
    else:
        save_lora(out, lora)


def lora_digest(folder: Path) -> str:
    """Return the digest of a LoRA's weights and config, as `sha256:...`. Raises NotAnAdapter and UnsafeAdapter."""
    return digest(adapter_files(folder))


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


def opened_shapes(opened: OpenedAdapter) -> dict[str, Shape]:
    """Return the shape of every layer of an opened LoRA or DoRA, by module. Raises MalformedAdapter."""
    found, folder = {}, opened.folder
    for module, parts in opened.names.parts.items():
        if not {*FACTORS} <= parts.keys():
            raise MalformedAdapter(f"{folder}: {module!r} has only one of lora_A and lora_B")
        a, b = (opened.shape(module, factor) for factor in FACTORS)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not 0 < a[0] <= MAX_RANK or 0 in (a[1], b[0]):
            raise MalformedAdapter(f"{folder}: {module!r}: lora_A is {a}, lora_B is {b}, not (r, d_in), (d_out, r)")
        found[module] = Shape(b[0], a[1], a[0])
    return found


def _opened_lora(folder: Path, allow_pickle: bool) -> OpenedAdapter:
    opened = open_adapter(folder, allow_pickle=allow_pickle)
    if opened.kind != LORA:
        key = "use_dora=True" if opened.config.get("use_dora") else f"peft_type={short(opened.kind)}"
        raise MalformedAdapter(
            f"{folder / CONFIG} has {key}: engines serve plain LoRA only; convert it: astra-convert {folder} OUT_DIR "
            "--base BASE --rank auto"
        )
    return opened


def _has_peft_names(opened: OpenedAdapter) -> bool:
    """Return whether an adapter is one safetensors file with LoRA factors only, named as PEFT names them."""
    names = [f"{PEFT_PREFIX}{module}.{factor}.weight" for module in opened.names.parts for factor in FACTORS]
    return isinstance(opened.tensors, TensorFile) and sorted(names) == sorted(opened.tensors)


def _provenance(folder: Path) -> Json:
    found = read_json(folder, PROVENANCE) if os.path.lexists(folder / PROVENANCE) else {}
    return found if found.get("format") == LORA_FORMAT else {}
