"""The Astra adapter folder, which `trainer` writes and `converter` reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from converter.adapter_dir.errors import MalformedAdapter, NotAnAdapter
from converter.adapter_dir.folder import CONFIG, PROVENANCE, Json, digest, file_in, read_json, write_json
from converter.adapter_dir.layers import Layers, Shape
from converter.adapter_dir.lora_config import check_config, scaling_of
from converter.adapter_dir.opened import ASTRA_WEIGHTS, LORA_WEIGHTS
from converter.adapter_dir.tensors import TensorFile

ASTRA_FORMAT = "astra-adapter/1"
_PARTS = ("A", "B", "A0", "B0")


@dataclass(frozen=True)
class AstraLayer:
    """The factors of one target layer: trained (a, b) and initial (a0, b0), all float32."""

    a: torch.Tensor  # (r, d_in)
    b: torch.Tensor  # (d_out, r)
    a0: torch.Tensor  # (r, d_in)
    b0: torch.Tensor  # (d_out, r)


@dataclass(frozen=True)
class AstraAdapter:
    """A trained Astra adapter: layers by module name, PEFT's config, provenance, and a classifier's head."""

    layers: Mapping[str, AstraLayer]
    config: Json
    provenance: Json
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Return s of delta W = s (B A - B0 A0)."""
        return scaling_of(self.config)


def save_astra(folder: Path, adapter: AstraAdapter) -> None:
    """Write an Astra adapter's weights, config and provenance into the existing `folder` (see `new_folder`)."""
    tensors = {}
    for module, layer in adapter.layers.items():
        for part, tensor in zip(_PARTS, (layer.a, layer.b, layer.a0, layer.b0), strict=True):
            tensors[f"{module}.{part}"] = tensor.detach().float().cpu().contiguous()
    tensors |= {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter.head.items()}
    save_file(tensors, folder / ASTRA_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, adapter.config)
    write_json(folder / PROVENANCE, {"format": ASTRA_FORMAT, **adapter.provenance})


def load_astra(folder: Path) -> AstraAdapter:
    """Check an Astra adapter folder and return it; a layer's numbers are read and checked when it is accessed.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    if (folder / LORA_WEIGHTS).is_file() and not (folder / ASTRA_WEIGHTS).is_file():
        raise NotAnAdapter(f"{folder} is already a LoRA: an Astra adapter folder has {ASTRA_WEIGHTS}")
    config, provenance = read_json(folder, CONFIG), read_json(folder, PROVENANCE)
    if provenance.get("format") != ASTRA_FORMAT:
        raise MalformedAdapter(f"{folder / PROVENANCE} has format {provenance.get('format')!r}, not {ASTRA_FORMAT!r}")
    match provenance.get("base"):
        case {"id": str(), "digest": str(), "dtype": str()}:
            pass
        case base:
            raise MalformedAdapter(f"{folder / PROVENANCE} needs base: id, digest and dtype, not {base!r}")
    config = check_config(folder, config)
    file = TensorFile(folder, ASTRA_WEIGHTS)
    head = [name for name in file if name.rpartition(".")[2] not in _PARTS]
    modules = sorted({name.rpartition(".")[0] for name in file if name not in head})
    if not modules:
        raise MalformedAdapter(f"{file.file} contains no layers")
    for module in modules:
        _check_shapes(file, module, (config.get("rank_pattern") or {}).get(module, config["r"]))
    return AstraAdapter(
        Layers(modules, lambda module: AstraLayer(*(file[f"{module}.{part}"].float() for part in _PARTS))),
        config,
        provenance,
        Layers(head, lambda name: file[name].float()),
    )


def astra_shapes(folder: Path) -> dict[str, Shape]:
    """Return the shape of every layer of an Astra adapter folder; reads only the header of its weight file."""
    shapes = TensorFile(folder, ASTRA_WEIGHTS).shapes
    modules = sorted(name.removesuffix(".A0") for name in shapes if name.endswith(".A0"))
    return {m: Shape(shapes[f"{m}.B0"][0], shapes[f"{m}.A0"][1], shapes[f"{m}.A0"][0]) for m in modules}


def astra_digest(folder: Path) -> str:
    """Return the digest of an Astra adapter's weights and config, as `sha256:...`."""
    return digest([file_in(folder, ASTRA_WEIGHTS), file_in(folder, CONFIG)])


def _check_shapes(file: TensorFile, module: str, rank: object) -> None:
    missing = [part for part in _PARTS if f"{module}.{part}" not in file]
    if missing:
        raise MalformedAdapter(f"{file.file} has no tensor '{module}.{missing[0]}'")
    a, b, a0, b0 = (file.shapes[f"{module}.{part}"] for part in _PARTS)
    if a != a0 or b != b0:
        raise MalformedAdapter(f"{file.file}: {module!r}: A and A0, or B and B0, differ in shape")
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank or 0 in (*a, *b):
        raise MalformedAdapter(f"{file.file}: {module!r}: A is {a} and B is {b}, not ({rank}, d_in), (d_out, {rank})")
