"""The algebra: an Astra adapter's weight change as one LoRA, without cancellation.

    delta W = s (B A - B0 A0) = s (dB A + B0 dA)       with dA = A - A0, dB = B - B0

The textbook form [B | -B0] [A ; A0] is a difference of two large products: stored in bfloat16 it loses the small change
between them (24 % error of delta W when the adapter moved by 1 %). In the second form every factor is as small as the
change itself, and the error is bfloat16's own rounding, 0.2 %.
"""

import torch

from converter.adapter_dir import AdapterError, AstraAdapter, AstraLayer, Json, LoraAdapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def delta_weight(layer: AstraLayer, scaling: float) -> torch.Tensor:
    """Return delta W (d_out, d_in) in float64, the reference that every other form is measured against."""
    a, b, a0, b0 = (t.double() for t in (layer.a, layer.b, layer.a0, layer.b0))
    return scaling * (b @ a - b0 @ a0)


def lora_factors(layer: AstraLayer, scaling: float, *, strict: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lora_A (k, d_in) and lora_B (d_out, k) in float32 with lora_B @ lora_A = delta W.

    k is 2r. With `strict`, for an adapter whose B was frozen (delta W = s B0 dA), k is r.
    """
    d_a = layer.a - layer.a0
    if strict:
        return d_a, scaling * layer.b0
    d_b = layer.b - layer.b0
    return torch.cat([layer.a, d_a]), scaling * torch.cat([d_b, layer.b0], dim=1)


def to_lora(adapter: AstraAdapter, dtype: torch.dtype) -> LoraAdapter:
    """Return the standard LoRA of `adapter`, its factors rounded to `dtype`, the scaling baked into lora_B.

    Engines read r and lora_alpha once per adapter, so lora_alpha = r. Where no layer's B moved (`train_b: false`, the
    strict tail subspace) the rank stays r; otherwise it is 2r. Raises AdapterError when a factor overflows `dtype`.
    """
    strict = all(torch.equal(layer.b, layer.b0) for layer in adapter.layers.values())
    rank = adapter.config["r"] * (1 if strict else 2)
    layers = {}
    for module, layer in adapter.layers.items():
        lora_a, lora_b = (t.to(dtype) for t in lora_factors(layer, adapter.scaling, strict=strict))
        if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            raise AdapterError(f"{module} overflows {dtype}: convert with --dtype float32 or bfloat16")
        layers[module] = (lora_a, lora_b)
    config: Json = adapter.config | {"r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True}
    source: Json = {key: adapter.provenance[key] for key in ("base", "method") if key in adapter.provenance}
    return LoraAdapter(layers, config, {**source, "strict": strict, "dtype": str(dtype).removeprefix("torch.")})
