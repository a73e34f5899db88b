"""Adapters whose change of a weight is no product of two small matrices as it is stored: DoRA, LoHa, LoKr, full layers.

    DoRA   W + delta W = m / |W + s B A| (W + s B A), norms by row: the change has the weight's full rank, and needs W
    LoHa   delta W = s (w1_a w1_b) * (w2_a w2_b), element by element: at most rank r^2
    LoKr   delta W = s kron(w1, w2): the rank of w1 times the rank of w2
    full   delta W = W' - W: a layer that was trained and stored as a whole

LoHa and LoKr are exact as a LoRA of that rank; a full change is exact with the shorter side of the weight as its rank.
The formulas are those of PEFT.
"""

from collections.abc import Mapping

import torch

from converter.adapter_dir import (
    LOHA,
    MAGNITUDE,
    AdapterError,
    Json,
    Layers,
    LoraAdapter,
    MalformedAdapter,
    OpenedAdapter,
    Shape,
    full_tensors,
    pattern_value,
    resolved,
)

Factors = tuple[torch.Tensor, torch.Tensor]  # lora_A (k, d_in), lora_B (d_out, k)
# Of PEFT's configs of LoHa and LoKr: the settings that a LoraConfig has, too.
_SHARED_SETTINGS = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


def as_factors(delta: torch.Tensor) -> Factors:
    """Return factors in float32 whose product is `delta` (d_out, d_in), with the rank of its shorter side."""
    d_out, d_in = delta.shape
    return (delta.float(), torch.eye(d_out)) if d_out <= d_in else (torch.eye(d_in), delta.float())


def product_shapes(opened: OpenedAdapter) -> dict[str, Shape]:
    """Return the shape of every layer of a LoHa or LoKr, with the rank of the exact LoRA. Raises MalformedAdapter."""
    return {
        module: _loha_shape(opened, module) if opened.kind == LOHA else _lokr_shape(opened, module)
        for module in opened.names.parts
    }


def product_scalings(opened: OpenedAdapter) -> dict[str, float]:
    """Return s = alpha / r of every layer of a LoHa or LoKr. Raises MalformedAdapter."""
    rank_parts = ("hada_w1_b",) if opened.kind == LOHA else ("lokr_w1_b", "lokr_w2_b")
    ranks = {
        module: next((opened.shape(module, part)[0] for part in rank_parts if part in parts), None)
        for module, parts in opened.names.parts.items()
    }
    config = resolved(opened.folder, opened.config, ranks, opened.alpha)
    of_module = (
        (
            module,
            pattern_value(config["alpha_pattern"], module, config[opened.alpha]),
            pattern_value(config["rank_pattern"], module, config["r"]),
        )
        for module in ranks
    )
    return {module: alpha / rank for module, alpha, rank in of_module}


def product_lora(opened: OpenedAdapter, shapes: Mapping[str, Shape], scalings: Mapping[str, float]) -> LoraAdapter:
    """Return a LoHa or LoKr as the LoRA that is equal to it, with a scaling of 1."""
    config = opened.config
    rank = max(shape.rank for shape in shapes.values())
    of_module = {f"^{module}": shape.rank for module, shape in shapes.items() if shape.rank != rank}
    lora: Json = {key: config[key] for key in _SHARED_SETTINGS if key in config}
    lora |= {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": of_module, "alpha_pattern": of_module}

    def factors(module: str) -> Factors:
        scaling, parts = scalings[module], _parts(opened, module)
        if opened.kind == LOHA:
            if shapes[module].rank == min(shapes[module][:2]):
                return as_factors(scaling * _loha(parts))
            b = (parts["hada_w1_a"][:, :, None] * parts["hada_w2_a"][:, None, :]).flatten(1)
            a = (parts["hada_w1_b"][:, None, :] * parts["hada_w2_b"][None, :, :]).flatten(0, 1)
        else:
            (a1, b1), (a2, b2) = (_kron_factors(parts, name) for name in ("lokr_w1", "lokr_w2"))
            a, b = torch.kron(a1, a2), torch.kron(b1, b2)
        return a.float(), (scaling * b).float()

    return LoraAdapter(Layers(list(shapes), factors), lora, {}, *full_tensors(opened))


def product_delta(opened: OpenedAdapter, module: str, scaling: float) -> torch.Tensor:
    """Return delta W (d_out, d_in) of a layer of a LoHa or LoKr by definition, in float64."""
    parts = _parts(opened, module)
    if opened.kind == LOHA:
        return scaling * _loha(parts)
    return scaling * torch.kron(*(_kron_side(parts, name) for name in ("lokr_w1", "lokr_w2")))


def check_magnitudes(opened: OpenedAdapter, shapes: Mapping[str, Shape]) -> None:
    """Raise MalformedAdapter unless every layer of a DoRA has a magnitude for each row of its weight."""
    for module, parts in opened.names.parts.items():
        found = opened.shape(module, MAGNITUDE) if MAGNITUDE in parts else ()
        if found not in ((shapes[module].d_out,), (1, shapes[module].d_out)):
            raise MalformedAdapter(f"{opened.folder}: {module!r} has no {MAGNITUDE} of {shapes[module].d_out} numbers")


def dora_delta(
    weight: torch.Tensor, magnitude: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> torch.Tensor:
    """Return delta W (d_out, d_in) of a DoRA in float64.

    `weight` is the base's (d_out, d_in), `magnitude` has d_out numbers, lora_b (d_out, k) contains the scaling.
    """
    base = weight.double()
    changed = base + lora_b.double() @ lora_a.double()
    norms: torch.Tensor = torch.linalg.vector_norm(changed, dim=1)
    return (magnitude.double().flatten() / norms)[:, None] * changed - base


def float_weight(folder: object, name: str, weight: torch.Tensor | None) -> torch.Tensor:
    """Return a weight of the base that can be computed with. Raises AdapterError."""
    if weight is None or not weight.is_floating_point() or weight.itemsize < 2:
        found = "missing" if weight is None else str(weight.dtype).removeprefix("torch.")
        raise AdapterError(f"{folder} needs {name!r} of the base, which is {found}: give the original base with --base")
    return weight


def _parts(opened: OpenedAdapter, module: str) -> dict[str, torch.Tensor]:
    return {part: opened.tensors[key].double() for part, key in opened.names.parts[module].items()}


def _loha(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])


def _loha_shape(opened: OpenedAdapter, module: str) -> Shape:
    parts = opened.names.parts[module]
    found = [
        opened.shape(module, part) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b") if part in parts
    ]
    if len(found) != 4 or any(len(shape) != 2 or 0 in shape for shape in found):
        raise MalformedAdapter(f"{opened.folder}: {module!r} needs four matrices hada_w1_a, w1_b, w2_a and w2_b")
    (d_out, r), w1_b, w2_a, (r2, d_in) = found
    if w1_b != (r, d_in) or w2_a != (d_out, r2):
        raise MalformedAdapter(f"{opened.folder}: the matrices hada_ of {module!r} do not fit: {found}")
    return Shape(d_out, d_in, min(r * r2, d_out, d_in))


def _lokr_shape(opened: OpenedAdapter, module: str) -> Shape:
    sides = [_kron_shape(opened, module, name) for name in ("lokr_w1", "lokr_w2")]
    (out1, in1, rank1), (out2, in2, rank2) = sides
    return Shape(out1 * out2, in1 * in2, rank1 * rank2)


def _kron_shape(opened: OpenedAdapter, module: str, name: str) -> Shape:
    """Return (rows, columns, rank) of one side of a Kronecker product, whole or as two factors."""
    parts = opened.names.parts[module]
    found = [opened.shape(module, part) for part in (name, f"{name}_a", f"{name}_b") if part in parts]
    if all(len(shape) == 2 and 0 not in shape for shape in found):
        if len(found) == 1 and name in parts:
            return Shape(found[0][0], found[0][1], min(found[0]))
        if len(found) == 2 and name not in parts and found[0][1] == found[1][0]:
            return Shape(found[0][0], found[1][1], min(found[0][0], *found[1]))
    raise MalformedAdapter(f"{opened.folder}: {module!r} needs the matrix {name}, or {name}_a and {name}_b: {found}")


def _kron_side(parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def _kron_factors(parts: Mapping[str, torch.Tensor], name: str) -> Factors:
    """Return the factors (k, columns) and (rows, k) of one side of a Kronecker product."""
    whole = _kron_side(parts, name)
    if name not in parts and parts[f"{name}_b"].shape[0] <= min(whole.shape):
        return parts[f"{name}_b"], parts[f"{name}_a"]
    rows, columns = whole.shape
    eye = torch.eye(min(rows, columns), dtype=whole.dtype)
    return (whole, eye) if rows <= columns else (eye, whole)
