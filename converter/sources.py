"""Read adapters of several kinds as the LoRA that each one is against the original base.

Supported are Astra adapters; plain LoRAs; DoRA, LoHa and LoKr; and LoRAs whose initial product B0 A0 was subtracted
from the base before training (PiSSA, OLoRA, CorDA, LoRA-GA, MiLoRA, the paper's reference code), which need their
initial adapter, too.
"""

from pathlib import Path

import torch

from converter import adapter_dir
from converter.adapter_dir import (
    ASTRA_WEIGHTS,
    LORA,
    SUBTRACT_FROM_BASE,
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
from converter.lora_source import base_of, lora_source
from converter.source import Factors, Residual, Source

_INIT_SETTINGS = ("corda_config", "lora_ga_config", "eva_config", "loftq_config")  # of PEFT: a plain LoRA has none
_INITIAL_FOLDERS = tuple(f"{name}_init" for name in ("astra", "corda", "pissa", "olora", "milora", "lora_ga"))


def open_source(
    folder: Path, *, initial: Path | None = None, allow_pickle: bool = False, base: Path | None = None
) -> Source:
    """Return the adapter in `folder`, whose kind is detected from its files. Raises AdapterError.

    `initial` is the folder of the adapter as it was saved before training. Without it, a folder such as `astra_init` is
    searched in `folder`, beside it and in its base, as the reference code writes it. With `base`, the folder of the
    base, a LoRA's layers have the base's names, and copies of its tensors are dropped. A source that needs the base
    says so in `needs_base`; its layers can be read only with it.
    """
    if (folder / ASTRA_WEIGHTS).is_file():
        if initial is not None:
            raise AdapterError(f"{folder} is an Astra adapter, which contains its initial factors: leave --initial out")
        return _astra(folder)
    found = [folder / name for name in _INITIAL_FOLDERS if (folder / name).is_dir()]
    if found and not (folder / adapter_dir.CONFIG).is_file():
        folder, initial = _trained_adapter_in(folder, found[0]), initial or found[0]
    opened = adapter_dir.open_adapter(folder, allow_pickle=allow_pickle)
    digest = {"digest": adapter_dir.lora_digest(folder)}
    if opened.kind != LORA:
        if initial is not None:
            raise AdapterError(f"{folder} is a {opened.kind}: --initial is for a LoRA")
        if str(opened.config.get("init_lora_weights")).lower().startswith((*SUBTRACT_FROM_BASE, "loftq")):
            raise AdapterError(f"{folder} is a {opened.kind} of changed weights of the base: merge it with PEFT")
        return lora_source(opened, digest, base)
    trained, shapes = adapter_dir.lora_from(opened), adapter_dir.opened_shapes(opened)
    residual = _find_residual_model(folder, trained)
    if initial is None and residual is not None:
        initial = next(residual / name for name in _INITIAL_FOLDERS if (residual / name).is_dir())
    init = trained.config.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else ""
    if init == "loftq":
        raise AdapterError(f"{folder} was trained with LoftQ: it belongs to the quantised base, not to the original")
    if initial is not None:
        untrained = adapter_dir.load_lora(initial, allow_pickle=allow_pickle)
        named = (name for name in SUBTRACT_FROM_BASE if init.startswith(name) or name in initial.name)
        method = next(named, "unknown")
        origin = {"kind": "lora-and-start", "method": method, **digest, "initial": adapter_dir.lora_digest(initial)}
        # PEFT's own methods subtract B0 A0 in memory, and the config names the original base. A saved residual model is
        # trained like any base, and the config names the residual model.
        recorded = base_of(trained) if init.startswith(SUBTRACT_FROM_BASE) and residual is None else {}
        return _trained_from(folder, trained, untrained, shapes, origin, recorded, residual)
    if init.startswith(SUBTRACT_FROM_BASE):
        raise AdapterError(
            f"{folder} was trained with init_lora_weights={init!r}, which subtracts the initial adapter from the base: "
            "give the adapter as it was saved before training with --initial DIR"
        )
    return lora_source(opened, digest, base)


def _astra(folder: Path) -> Source:
    adapter, digest = adapter_dir.load_astra(folder), adapter_dir.astra_digest(folder)
    origin = {"kind": "astra", "method": adapter.provenance.get("method", "astra"), "digest": digest}
    return astra_source(adapter, adapter_dir.astra_shapes(folder), origin)


def astra_source(adapter: AstraAdapter, shapes: dict[str, Shape], origin: Json) -> Source:
    """Return an Astra adapter as a source; `shapes` are those of its layers, `origin` is for the provenance."""
    return Source(
        Layers(list(adapter.layers), lambda module: lora_factors(adapter.layers[module], adapter.scaling)),
        lambda module, x: _apply_delta(adapter.layers[module], adapter.scaling, x),
        shapes,
        adapter.config,
        adapter.provenance["base"],
        origin,
        adapter.head,
    )


def _trained_from(
    folder: Path,
    trained: LoraAdapter,
    initial: LoraAdapter,
    shapes: dict[str, Shape],
    origin: Json,
    base: Json,
    residual: Path | None,
) -> Source:
    """Return the adapter `trained`, which started as `initial`, as s (B A - B0 A0) against the original base."""
    if set(trained.layers) != set(initial.layers):
        module = sorted(set(trained.layers) ^ set(initial.layers))[0]
        raise MalformedAdapter(f"{folder} and its initial adapter have different layers: {module!r} is only in one")

    def layer(module: str) -> tuple[AstraLayer, float]:
        (a, b), (a0, b0) = trained.layers[module], initial.layers[module]
        if a.shape != a0.shape or b.shape != b0.shape:
            raise MalformedAdapter(f"{folder}: {module!r} has another shape in the initial adapter")
        scaling = trained.scaling(module, len(a))
        if scaling != initial.scaling(module, len(a)):
            raise MalformedAdapter(f"{folder}: {module!r} has another scaling in the initial adapter")
        return AstraLayer(a.float(), b.float(), a0.float(), b0.float()), scaling

    def initial_factors(module: str) -> Factors:
        a0, b0 = initial.layers[module]
        return a0.float(), initial.scaling(module, len(a0)) * b0.float()

    return Source(
        Layers(list(trained.layers), lambda module: lora_factors(*layer(module))),
        lambda module, x: _apply_delta(*layer(module), x),
        shapes,
        {key: value for key, value in trained.config.items() if key not in _INIT_SETTINGS}
        | {"init_lora_weights": True},
        base,
        origin,
        trained.head,
        residual=Residual(residual, Layers(list(initial.layers), initial_factors)) if residual else None,
    )


def _apply_delta(layer: AstraLayer, scaling: float, x: torch.Tensor) -> torch.Tensor:
    """Return delta W x = s (B A - B0 A0) x by definition; in float64 the cancellation is harmless."""
    a, b, a0, b0 = (t.double() for t in (layer.a, layer.b, layer.a0, layer.b0))
    return scaling * (b @ (a @ x) - b0 @ (a0 @ x))


def _trained_adapter_in(folder: Path, initial: Path) -> Path:
    """Return the trained adapter in a folder of the reference code, which contains a residual model and `initial`."""
    found = sorted(f.parent for f in folder.glob("*/adapter_config.json") if f.parent.name not in _INITIAL_FOLDERS)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise NotAnAdapter(
            f"{folder} has {initial.name} and needs one trained adapter beside it, but there are: {names}; "
            f"give the folder of the trained adapter, and --initial {initial}"
        )
    return found[0]


def _find_residual_model(folder: Path, trained: LoraAdapter) -> Path | None:
    """Return the model folder that the adapter names as its base or is in, if it contains an initial adapter."""
    base = trained.config.get("base_model_name_or_path")
    named = [Path(base)] if isinstance(base, str) and "\0" not in base else []
    models = (path for path in (*named, folder.resolve().parent) if list(path.glob("*.safetensors")))
    return next((path for path in models for name in _INITIAL_FOLDERS if (path / name).is_dir()), None)
