"""Adapters of any origin, as the LoRA that each amounts to against the original base.

Read are Astra folders; LoRAs whose start was taken out of the base (PiSSA, OLoRA, CorDA, LoRA-GA, MiLoRA and the
paper's reference code), which need that start beside them; and plain LoRAs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from converter import adapter_dir
from converter.adapter_dir import (
    ASTRA_WEIGHTS,
    AdapterError,
    AstraAdapter,
    AstraLayer,
    Json,
    Layers,
    LoraAdapter,
    MalformedAdapter,
    NotAnAdapter,
    Shape,
)
from converter.delta import lora_factors

Factors = tuple[torch.Tensor, torch.Tensor]  # lora_A (k, d_in), lora_B (d_out, k)

# PEFT's initialisations that take B0 A0 out of the base's weights, and those that leave the base as it is.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "milora", "astra")
_METHOD_SETTINGS = ("corda_config", "lora_ga_config", "eva_config", "loftq_config")  # of PEFT: of no use to a LoRA
_START_FOLDERS = tuple(f"{name}_init" for name in ("astra", "corda", "pissa", "olora", "milora", "lora_ga"))


@dataclass(frozen=True)
class Residual:
    """A base out of whose weights the adapter's start was taken: W - s B0 A0."""

    folder: Path
    start: Mapping[str, Factors]  # float32 by module, s B0 A0 = lora_B lora_A


@dataclass(frozen=True)
class Source:
    """An adapter as it was found, read layer by layer."""

    factors: Mapping[str, Factors]  # float32 by module, delta W = lora_B lora_A, no cancellation left
    change: Callable[[str, torch.Tensor], torch.Tensor]  # (module, x (d_in, n)) -> delta W x, float64, as it is defined
    shapes: dict[str, Shape]  # by module
    config: Json
    base: Json  # id; digest and dtype where they were recorded
    origin: Json  # kind, method and digests, for the provenance
    head: Mapping[str, torch.Tensor]
    plain: LoraAdapter | None = None  # the adapter itself, where it is a LoRA already
    residual: Residual | None = None  # the model that was trained instead of the base, where that is at hand


def open_source(folder: Path, *, initial: Path | None = None, allow_pickle: bool = False) -> Source:
    """Find out what the adapter in `folder` is and return it. Raises AdapterError."""
    if (folder / ASTRA_WEIGHTS).is_file():
        if initial is not None:
            raise AdapterError(f"{folder} is an Astra adapter: it holds its start itself, leave --initial out")
        return _astra(folder)
    starts = [folder / name for name in _START_FOLDERS if (folder / name).is_dir()]
    if starts and not (folder / adapter_dir.CONFIG).is_file():
        folder, initial = _trained_beside(folder, starts[0]), initial or starts[0]
    trained = adapter_dir.load_lora(folder, allow_pickle=allow_pickle)
    shapes = adapter_dir.lora_shapes(folder, allow_pickle=allow_pickle)
    digest = {"digest": adapter_dir.lora_digest(folder)}
    residual = _residual_model(folder, trained)
    if initial is None and residual is not None:
        initial = next(residual / name for name in _START_FOLDERS if (residual / name).is_dir())
    how = trained.config.get("init_lora_weights")
    how = how.lower() if isinstance(how, str) else ""
    if how == "loftq":
        raise AdapterError(f"{folder} was trained with LoftQ: it belongs to the quantised base, not to the original")
    if initial is not None:
        start = adapter_dir.load_lora(initial, allow_pickle=allow_pickle)
        method = next((name for name in _CHANGE_THE_BASE if how.startswith(name) or name in initial.name), "unknown")
        origin = {"kind": "lora-and-start", "method": method, **digest, "initial": adapter_dir.lora_digest(initial)}
        # PEFT's own methods take the start out in memory, and the config names the original base. Saved residual models
        # are trained as any other base, and the config names them.
        base = _base_of(trained) if how.startswith(_CHANGE_THE_BASE) and residual is None else {}
        return _with_start(folder, trained, start, shapes, origin, base, residual)
    if how.startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"{folder} was trained with init_lora_weights={how!r}, which takes the adapter's start out of the base: "
            "give the start, saved before training, with --initial DIR"
        )
    return _plain(trained, shapes, {"kind": "lora", "method": "lora", **digest})


def _astra(folder: Path) -> Source:
    adapter, digest = adapter_dir.load_astra(folder), adapter_dir.astra_digest(folder)
    origin = {"kind": "astra", "method": adapter.provenance.get("method", "astra"), "digest": digest}
    return astra_source(adapter, adapter_dir.astra_shapes(folder), origin)


def astra_source(adapter: AstraAdapter, shapes: dict[str, Shape], origin: Json) -> Source:
    """Return an Astra adapter as the LoRA that it amounts to."""
    return Source(
        Layers(list(adapter.layers), lambda module: lora_factors(adapter.layers[module], adapter.scaling)),
        lambda module, x: _change(adapter.layers[module], adapter.scaling, x),
        shapes,
        adapter.config,
        adapter.provenance["base"],
        origin,
        adapter.head,
    )


def _with_start(
    folder: Path,
    trained: LoraAdapter,
    start: LoraAdapter,
    shapes: dict[str, Shape],
    origin: Json,
    base: Json,
    residual: Path | None,
) -> Source:
    if set(trained.layers) != set(start.layers):
        odd = sorted(set(trained.layers) ^ set(start.layers))[0]
        raise MalformedAdapter(f"{folder} and its start do not have the same layers: {odd!r} is in one of them only")

    def layer(module: str) -> tuple[AstraLayer, float]:
        (a, b), (a0, b0) = trained.layers[module], start.layers[module]
        if a.shape != a0.shape or b.shape != b0.shape:
            raise MalformedAdapter(f"{folder}: {module!r} and its start differ in shape")
        scaling = trained.scaling(module, len(a))
        if scaling != start.scaling(module, len(a)):
            raise MalformedAdapter(f"{folder}: {module!r} and its start differ in their scaling")
        return AstraLayer(a.float(), b.float(), a0.float(), b0.float()), scaling

    def start_of(module: str) -> Factors:
        a0, b0 = start.layers[module]
        return a0.float(), start.scaling(module, len(a0)) * b0.float()

    return Source(
        Layers(list(trained.layers), lambda module: lora_factors(*layer(module))),
        lambda module, x: _change(*layer(module), x),
        shapes,
        {key: value for key, value in trained.config.items() if key not in _METHOD_SETTINGS}
        | {"init_lora_weights": True},
        base,
        origin,
        trained.head,
        residual=Residual(residual, Layers(list(start.layers), start_of)) if residual else None,
    )


def _plain(lora: LoraAdapter, shapes: dict[str, Shape], origin: Json) -> Source:
    def factors(module: str) -> Factors:
        a, b = lora.layers[module]
        return a.float(), lora.scaling(module, len(a)) * b.float()

    def change(module: str, x: torch.Tensor) -> torch.Tensor:
        a, b = lora.layers[module]
        return lora.scaling(module, len(a)) * (b.double() @ (a.double() @ x))

    layers = Layers(list(lora.layers), factors)
    return Source(layers, change, shapes, lora.config, _base_of(lora), origin, lora.head, plain=lora)


def _change(layer: AstraLayer, scaling: float, x: torch.Tensor) -> torch.Tensor:
    """Return delta W x = s (B A - B0 A0) x, as it is written down: float64 forgives the cancellation."""
    a, b, a0, b0 = (t.double() for t in (layer.a, layer.b, layer.a0, layer.b0))
    return scaling * (b @ (a @ x) - b0 @ (a0 @ x))


def _trained_beside(folder: Path, start: Path) -> Path:
    """Return the trained adapter in a folder of the reference code, which holds a residual model and `start`."""
    found = sorted(f.parent for f in folder.glob("*/adapter_config.json") if f.parent.name not in _START_FOLDERS)
    if len(found) != 1:
        those = ", ".join(path.name for path in found) or "none"
        raise NotAnAdapter(
            f"{folder} holds {start.name} and needs one trained adapter beside it, not {those}: "
            f"give the adapter's own folder, and --initial {start}"
        )
    return found[0]


def _residual_model(folder: Path, trained: LoraAdapter) -> Path | None:
    """Return the folder of a residual model that the adapter lies in, or names as its base, where there is a start."""
    base = trained.config.get("base_model_name_or_path")
    named = [Path(base)] if isinstance(base, str) and "\0" not in base else []
    near = (path for path in (*named, folder.resolve().parent) if list(path.glob("*.safetensors")))
    return next((path for path in near for name in _START_FOLDERS if (path / name).is_dir()), None)


def _base_of(lora: LoraAdapter) -> Json:
    recorded, named = lora.provenance.get("base"), lora.config.get("base_model_name_or_path")
    if isinstance(recorded, dict) and isinstance(recorded.get("id"), str):
        return {key: recorded[key] for key in ("id", "digest", "dtype") if isinstance(recorded.get(key), str)}
    return {"id": named} if isinstance(named, str) and named else {}
