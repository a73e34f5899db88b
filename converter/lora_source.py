"""The sources that are a LoRA of PEFT's layout, or one of the other kinds that can be written as a LoRA."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from converter import adapter_dir
from converter.adapter_dir import (
    DORA,
    LORA,
    MAGNITUDE,
    AdapterError,
    Json,
    Layers,
    LoraAdapter,
    OpenedAdapter,
    Shape,
)
from converter.adapter_dir.on_base import RESTRICTIONS
from converter.other_kinds import (
    as_factors,
    check_magnitudes,
    dora_delta,
    float_weight,
    product_delta,
    product_lora,
    product_scalings,
    product_shapes,
)
from converter.source import Factors, Source


@dataclass(frozen=True)
class _Fitted:
    """An adapter with the names of its base, if the base is there."""

    lora: LoraAdapter
    shapes: dict[str, Shape]  # of its own layers
    in_folder: dict[str, str]  # the names of its layers in the folder
    dropped: list[str] = field(default_factory=list)
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)  # trained output layer, by module


def lora_source(opened: OpenedAdapter, digest: Json, base: Path | None) -> Source:
    """Return the adapter in an opened folder as a source; see `open_source`. Raises AdapterError."""
    is_lora = opened.kind in (LORA, DORA)
    shapes = adapter_dir.opened_shapes(opened) if is_lora else product_shapes(opened)
    scalings = {} if is_lora else product_scalings(opened)
    lora = adapter_dir.lora_from(opened) if is_lora else product_lora(opened, shapes, scalings)
    if opened.kind == DORA:
        check_magnitudes(opened, shapes)
    fitted = _fitted(opened.folder, lora, shapes, base)
    delta = _Delta(opened, fitted, scalings, base)
    modules = {module: delta.shape(module) for module in [*fitted.shapes, *fitted.whole]}
    is_plain = opened.kind == LORA and not fitted.whole
    config = {**fitted.lora.config, "use_dora": False}
    if fitted.whole:
        config |= {"target_modules": list(modules), **dict.fromkeys(RESTRICTIONS)}
    kind = opened.kind.lower()
    return Source(
        Layers(list(modules), delta.factors),
        delta.applied,
        modules,
        fitted.lora.config if is_plain else config,
        base_of(lora),
        {"kind": kind, "method": kind, **digest},
        fitted.lora.head,
        plain_lora=fitted.lora if is_plain else None,
        needs_base=None if base else _needs_base(opened, lora),
        dropped=fitted.dropped,
        is_product=is_plain,
    )


def base_of(lora: LoraAdapter) -> Json:
    """Return the base that a LoRA records or names: id, digest and dtype, if they are known."""
    recorded, named = lora.provenance.get("base"), lora.config.get("base_model_name_or_path")
    if isinstance(recorded, dict) and isinstance(recorded.get("id"), str):
        return {key: recorded[key] for key in ("id", "digest", "dtype") if isinstance(recorded.get(key), str)}
    return {"id": named} if isinstance(named, str) and named else {}


class _Delta:
    """The change of each layer, as factors in float32 and applied to vectors in float64."""

    def __init__(
        self, opened: OpenedAdapter, fitted: _Fitted, scalings: Mapping[str, float], base: Path | None
    ) -> None:
        self._opened, self._fitted, self._scalings = opened, fitted, scalings
        self._weights: Mapping[str, torch.Tensor] = (
            adapter_dir.base_parameters(base) if base and self._needs_weights() else {}
        )

    def shape(self, module: str) -> Shape:
        if module in self._fitted.whole:
            d_out, d_in = self._fitted.whole[module].shape
            return Shape(d_out, d_in, min(d_out, d_in))
        shape = self._fitted.shapes[module]
        return shape._replace(rank=min(shape[:2])) if self._opened.kind == DORA else shape

    def factors(self, module: str) -> Factors:
        if self._is_whole(module):
            return as_factors(self._whole(module))
        lora_a, lora_b = self._fitted.lora.layers[module]
        return lora_a.float(), self._fitted.lora.scaling(module, len(lora_a)) * lora_b.float()

    def applied(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """Return delta W x by definition."""
        if self._is_whole(module):
            return self._whole(module) @ x
        if self._opened.kind == LORA:
            lora_a, lora_b = self._fitted.lora.layers[module]
            return self._fitted.lora.scaling(module, len(lora_a)) * (lora_b.double() @ (lora_a.double() @ x))
        name = self._fitted.in_folder[module]
        return product_delta(self._opened, name, self._scalings[name]) @ x

    def _needs_weights(self) -> bool:
        return self._opened.kind == DORA or bool(self._fitted.whole)

    def _is_whole(self, module: str) -> bool:
        return self._opened.kind == DORA or module in self._fitted.whole

    def _whole(self, module: str) -> torch.Tensor:
        """Return delta W (d_out, d_in) in float64."""
        name = f"{module}.weight"
        weight = float_weight(self._opened.folder, name, self._weights.get(name))
        if module in self._fitted.whole:
            return self._fitted.whole[module].double() - weight.double()
        if self._fitted.lora.config.get("fan_in_fan_out") and not module.endswith("lm_head"):
            weight = weight.T
        lora_a, lora_b = self._fitted.lora.layers[module]
        parts = self._opened.names.parts[self._fitted.in_folder[module]]
        scaling = self._fitted.lora.scaling(module, len(lora_a))
        return dora_delta(weight, self._opened.tensors[parts[MAGNITUDE]], lora_a, scaling * lora_b.double())


def _needs_base(opened: OpenedAdapter, lora: LoraAdapter) -> str | None:
    if opened.kind == DORA:
        return "it is a DoRA, whose change of the weights depends on the base"
    if name := next(iter(lora.copies), None):
        return f"it has the base's tensor {name!r}, which has to be compared with the base"
    return None


def _fitted(folder: Path, lora: LoraAdapter, shapes: dict[str, Shape], base: Path | None) -> _Fitted:
    """Return the adapter on its base: renamed, without copies, and the trained output layer as its weight.

    Raises AdapterError for a trained embedding, and other tensors that no LoRA can express.
    """
    if base is None:
        return _Fitted(lora, shapes, {module: module for module in shapes})
    modules = adapter_dir.base_modules(base)
    matrices = modules.shapes
    found = adapter_dir.on_base(folder, lora, base, modules)
    heads, copies = found.lora.head, found.lora.copies
    full = Layers([*heads, *copies], lambda name: heads[name] if name in heads else copies[name])
    heads_of = {name.removesuffix(".weight"): name for name in full if name.endswith("lm_head.weight")}
    whole = {module: name for module, name in heads_of.items() if matrices.get(module) == tuple(full[name].shape)}
    if twice := next((module for module in whole if module in found.names.values()), None):
        raise AdapterError(f"{folder} has a LoRA of {twice!r} and another weight of it: train one of them")
    left = [name for name in found.lora.copies if name not in whole.values()]
    if left:
        raise AdapterError(
            f"{folder}: {left[0]!r} is not equal to the base's tensor, and no LoRA of linear layers can express that: "
            "train without it, or merge the adapter into the base with PEFT's merge_and_unload"
        )
    head = Layers([name for name in found.lora.head if name not in whole.values()], lambda name: full[name])
    config = found.lora.config if head else {**found.lora.config, "modules_to_save": None}
    return _Fitted(
        replace(found.lora, head=head, copies={}, config=config),
        {found.names[module]: shape for module, shape in shapes.items()},
        {new: old for old, new in found.names.items()},
        found.dropped,
        Layers(list(whole), lambda module: full[whole[module]]),
    )
