"""The adapter folders on disk: reading, validating and writing them, and knowing which base they belong to.

This is the only module through which `trainer`, `converter` and `astra_serve` meet.

An Astra adapter folder                              A LoRA folder (PEFT's own layout)
    astra_weights.safetensors  M.A M.B M.A0 M.B0         adapter_model.safetensors
    adapter_config.json        PEFT's LoraConfig         adapter_config.json
    astra.json                 provenance                astra.json    provenance (optional)
    README.md                  model card                README.md     model card

`M` is the module's name in the base model. Per module A and A0 are (r, d_in), B and B0 are (d_out, r), float32; r may
differ between modules. A classifier's head is trained whole: its parameters are stored under their own names.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

ASTRA_WEIGHTS = "astra_weights.safetensors"
LORA_WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROVENANCE = "astra.json"
ASTRA_FORMAT = "astra-adapter/1"
LORA_FORMAT = "astra-lora/1"
_PEFT_PREFIX = "base_model.model."

Json = dict[str, Any]


class AdapterError(ValueError):
    """What can be wrong with an adapter folder; the message is one line that says what to do.

    AdapterError
    ├── NotAnAdapter      the folder is missing, or files that make it an adapter are
    ├── MalformedAdapter  its files contradict each other or hold unusable numbers
    ├── WrongBase         it was trained on another base model
    ├── BaseNotFound      the base model is not a folder with a model, nor on the hub
    ├── OutputExists      the output folder is already there
    └── CannotWrite       the output folder cannot be made
    """


class NotAnAdapter(AdapterError):
    """The folder is missing, or files that make it an adapter are."""


class MalformedAdapter(AdapterError):
    """The adapter's files contradict each other or hold unusable numbers."""


class WrongBase(AdapterError):
    """The adapter was trained on another base model."""


class BaseNotFound(AdapterError):
    """The base model is not a folder with a model, nor on the hub."""


class OutputExists(AdapterError):
    """The output folder is already there."""


class CannotWrite(AdapterError):
    """The output folder cannot be made."""


@dataclass(frozen=True)
class AstraLayer:
    """One target layer: the trained pair and the pair that training started from, all float32."""

    a: torch.Tensor  # (r, d_in)
    b: torch.Tensor  # (d_out, r)
    a0: torch.Tensor  # (r, d_in)
    b0: torch.Tensor  # (d_out, r)


@dataclass(frozen=True)
class AstraAdapter:
    """A trained Astra adapter: its layers by module name, PEFT's config and where it came from."""

    layers: dict[str, AstraLayer]
    config: Json
    provenance: Json
    head: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Return s of delta W = s (B A - B0 A0)."""
        rank: int = self.config["r"]
        return float(self.config["lora_alpha"] / (rank**0.5 if self.config.get("use_rslora") else rank))


@dataclass(frozen=True)
class LoraAdapter:
    """A standard LoRA: per module lora_A (k, d_in) and lora_B (d_out, k), delta W = (lora_alpha / k) lora_B lora_A."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    config: Json
    provenance: Json
    head: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraHeader:
    """What a LoRA folder is, read without its weights."""

    rank: int
    shapes: dict[str, tuple[int, int]]  # module: (d_out, d_in)
    base_digest: str | None  # None where the adapter does not record its base


# --- the base model -------------------------------------------------------------------------------------------------


def find_base(base: str) -> Path:
    """Return the local folder of `base`, a path or a hub id, which is downloaded (or found in the hub's cache).

    Raises BaseNotFound.
    """
    path = Path(base)
    if not path.is_dir():
        if path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
            raise BaseNotFound(f"base model {base!r} is not a folder: give a local model folder or a hub id (org/name)")
        try:
            path = Path(
                snapshot_download(base, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"])
            )
        except (OSError, ValueError) as error:  # the hub's errors are OSErrors and ValueErrors
            reason = str(error).strip().splitlines()[0]
            raise BaseNotFound(
                f"base model {base!r} is no local folder and the hub did not give it: {reason}"
            ) from error
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise BaseNotFound(f"base model {base!r} has no config.json beside *.safetensors: is it a transformers model?")
    return path


def base_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and bytes of the base's weight files, as `sha256:...`."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def base_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every matrix in the base, by module name, from the files' headers alone.

    Raises BaseNotFound.
    """
    shapes = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is not a dict)
                    shape = tensors.get_slice(key).get_shape()
                    if len(shape) == 2:
                        shapes[key.removesuffix(".weight")] = (shape[0], shape[1])
    except (SafetensorError, OSError) as error:
        raise BaseNotFound(f"base model file {file} cannot be read: {error}") from error
    return shapes


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block succeeds; when it fails nothing is left behind.

    Raises OutputExists and CannotWrite.
    """
    refuse_existing(out)
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise CannotWrite(f"output folder {out} cannot be made: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read; servers run as other users
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        refuse_existing(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # another run may have put its output beside ours
            for parent in made:
                parent.rmdir()
        raise


def refuse_existing(out: Path) -> None:
    """Raise OutputExists when there is something at `out`: nothing is ever overwritten."""
    if out.exists() or out.is_symlink():
        raise OutputExists(f"{out} exists already: choose another output folder or remove it first")


def save_astra(folder: Path, adapter: AstraAdapter) -> None:
    """Write an Astra adapter's weights, config and provenance into `folder` (see `new_folder`)."""
    tensors = {}
    for module, layer in adapter.layers.items():
        for suffix, tensor in (("A", layer.a), ("B", layer.b), ("A0", layer.a0), ("B0", layer.b0)):
            tensors[f"{module}.{suffix}"] = tensor.detach().float().cpu().contiguous()
    tensors |= {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter.head.items()}
    save_file(tensors, folder / ASTRA_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, adapter.config)
    write_json(folder / PROVENANCE, {"format": ASTRA_FORMAT, **adapter.provenance})


def save_lora(folder: Path, adapter: LoraAdapter) -> None:
    """Write a LoRA in PEFT's layout into `folder` (see `new_folder`)."""
    tensors = {}
    for module, (lora_a, lora_b) in adapter.layers.items():
        tensors[f"{_PEFT_PREFIX}{module}.lora_A.weight"] = lora_a.detach().cpu().contiguous()
        tensors[f"{_PEFT_PREFIX}{module}.lora_B.weight"] = lora_b.detach().cpu().contiguous()
    tensors |= {f"{_PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in adapter.head.items()}
    save_file(tensors, folder / LORA_WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, adapter.config)
    write_json(folder / PROVENANCE, {"format": LORA_FORMAT, **adapter.provenance})


def write_json(path: Path, content: Json) -> None:
    """Write `content` so that the same content gives the same bytes."""
    # PEFT's configs hold sets: they become sorted lists, so that the same adapter gives the same bytes.
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")


# --- reading --------------------------------------------------------------------------------------------------------


def load_astra(folder: Path) -> AstraAdapter:
    """Read and validate an Astra adapter folder. Raises NotAnAdapter and MalformedAdapter."""
    if (folder / LORA_WEIGHTS).is_file() and not (folder / ASTRA_WEIGHTS).is_file():
        raise NotAnAdapter(f"{folder} holds a LoRA already: an Astra adapter folder has {ASTRA_WEIGHTS}")
    config, provenance = read_json(folder, CONFIG), read_json(folder, PROVENANCE)
    if provenance.get("format") != ASTRA_FORMAT:
        raise MalformedAdapter(f"{folder / PROVENANCE} has format {provenance.get('format')!r}, not {ASTRA_FORMAT!r}")
    match provenance.get("base"):
        case {"id": str(), "digest": str(), "dtype": str()}:
            pass
        case base:
            raise MalformedAdapter(f"{folder / PROVENANCE} needs base: id, digest and dtype, not {base!r}")
    _check_config(folder, config)
    tensors = _read_tensors(folder, ASTRA_WEIGHTS)
    if not tensors:
        raise MalformedAdapter(f"{folder / ASTRA_WEIGHTS} holds no layers")
    layers = {}
    head = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] not in ("A", "B", "A0", "B0")}
    for module in sorted({key.rpartition(".")[0] for key in tensors if key not in head}):
        try:
            layer = AstraLayer(*(tensors[f"{module}.{suffix}"] for suffix in ("A", "B", "A0", "B0")))
        except KeyError as error:
            raise MalformedAdapter(f"{folder / ASTRA_WEIGHTS} has no tensor {error}") from error
        if layer.a.shape != layer.a0.shape or layer.b.shape != layer.b0.shape:
            raise MalformedAdapter(f"{folder / ASTRA_WEIGHTS}: {module}: A and A0, or B and B0, differ in shape")
        patterns: Json = config.get("rank_pattern") or {}
        _check_pair(folder, module, patterns.get(module, config["r"]), layer.a, layer.b)
        layers[module] = layer
    return AstraAdapter(layers, config, provenance, head)


def read_lora_header(folder: Path) -> LoraHeader:
    """Read and check what a LoRA folder is without reading its weights. Raises NotAnAdapter and MalformedAdapter."""
    if (folder / ASTRA_WEIGHTS).is_file():
        raise NotAnAdapter(f"{folder} is an Astra adapter: convert it first (astra-convert {folder} OUT_DIR)")
    config = read_json(folder, CONFIG)
    _check_config(folder, config)
    for key, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(key) not in (plain, None):
            raise MalformedAdapter(f"{folder / CONFIG} has {key}={config[key]!r}: the engine serves plain LoRA only")
    base = read_json(folder, PROVENANCE).get("base") if (folder / PROVENANCE).is_file() else None
    file = _file(folder, LORA_WEIGHTS)
    halves: dict[str, dict[str, list[int]]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is not a dict)
                module, half = key.removeprefix(_PEFT_PREFIX).removesuffix(".weight").rsplit(".", 1)
                halves.setdefault(module, {})[half] = tensors.get_slice(key).get_shape()
    except (SafetensorError, ValueError, OSError) as error:
        raise MalformedAdapter(f"{folder / LORA_WEIGHTS} cannot be read: {error}") from error
    # The engine sizes its slots by what the config says, whatever the tensors are.
    shapes, rank = {}, max([config["r"], *(config.get("rank_pattern") or {}).values()])
    for module, half in halves.items():
        a, b = half.get("lora_A", []), half.get("lora_B", [])
        if set(half) != {"lora_A", "lora_B"} or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise MalformedAdapter(f"{folder / LORA_WEIGHTS}: {module} is not a matching lora_A and lora_B: {half}")
        shapes[module] = (b[0], a[1])
        rank = max(rank, a[0])
    if not shapes:
        raise MalformedAdapter(f"{folder / LORA_WEIGHTS} holds no LoRA")
    return LoraHeader(rank, shapes, base.get("digest") if isinstance(base, dict) else None)


def check_base(folder: Path, recorded_digest: str | None, digest: str) -> None:
    """Raise WrongBase when the adapter in `folder` records another base than the one with `digest`."""
    if recorded_digest is not None and recorded_digest != digest:
        raise WrongBase(
            f"{folder} was trained on another base ({recorded_digest[:19]}..., this one is {digest[:19]}...)"
        )


def check_shapes(folder: Path, header: LoraHeader, base: dict[str, tuple[int, int]]) -> None:
    """Raise WrongBase when a module of the adapter is not in the base or has another shape there."""
    for module, shape in header.shapes.items():
        if base.get(module) != shape:
            there = base.get(module, "no such layer")
            raise WrongBase(f"{folder} does not fit this base: {module} is {shape} in the adapter, {there} in the base")


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise NotAnAdapter(f"{folder} has no {name}" if folder.is_dir() else f"there is no folder {folder}")
    return folder / name


def read_json(folder: Path, name: str) -> Json:
    """Return the JSON object in a file of an adapter folder. Raises NotAnAdapter and MalformedAdapter."""
    file = _file(folder, name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MalformedAdapter(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise MalformedAdapter(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise MalformedAdapter(f"{folder / name} is not a JSON object")
    return content


def _read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    file = _file(folder, name)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise MalformedAdapter(f"{file} cannot be read: {error}") from error


def _check_config(folder: Path, config: Json) -> None:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise MalformedAdapter(f"{folder / CONFIG} needs r (a positive integer) and lora_alpha (a number)")


def _check_pair(folder: Path, module: str, rank: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise MalformedAdapter(
            f"{folder}: {module}: A is {tuple(a.shape)} and B is {tuple(b.shape)}, not ({rank}, d_in), (d_out, {rank})"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise MalformedAdapter(f"{folder}: {module} holds NaN or infinite values")
