"""The algebra: an Astra adapter's weight change as one LoRA, without cancellation.

    delta W = s (B A - B0 A0) = s (dB A + B0 dA)       with dA = A - A0, dB = B - B0

The textbook form [B | -B0] [A ; A0] is a difference of two large products: stored in bfloat16 it loses the small change
between them (24 % error of delta W when the adapter moved by 1 %). In the second form every factor is as small as the
change itself, and the error is bfloat16's own rounding, 0.2 %.
"""

import torch
from torch.nn import functional as F

from converter.adapter_dir import AdapterError, AstraAdapter, AstraLayer, Json, LoraAdapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def delta_weight(layer: AstraLayer, scaling: float) -> torch.Tensor:
    """Return delta W (d_out, d_in) in float64, the reference that every other form is measured against."""
    a, b, a0, b0 = (t.double() for t in (layer.a, layer.b, layer.a0, layer.b0))
    return scaling * (b @ a - b0 @ a0)


def lora_factors(layer: AstraLayer, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lora_A (k, d_in) and lora_B (d_out, k) in float32 with lora_B @ lora_A = delta W.

    k is 2r; it is r where B did not move (delta W = s B0 dA) or started at zero (delta W = s B A).
    """
    d_a, d_b = layer.a - layer.a0, layer.b - layer.b0
    if not d_b.any():
        return d_a, scaling * layer.b0
    if not layer.b0.any():
        return layer.a, scaling * d_b
    return torch.cat([layer.a, d_a]), scaling * torch.cat([d_b, layer.b0], dim=1)


def to_lora(adapter: AstraAdapter, dtype: torch.dtype) -> LoraAdapter:
    """Return the standard LoRA of `adapter`, its factors rounded to `dtype`, the scaling baked into lora_B.

    Engines read r and lora_alpha once per adapter, so lora_alpha = r, and layers of a smaller rank than the largest are
    padded with zeros. Raises AdapterError when a factor overflows `dtype`.
    """
    factors = {module: lora_factors(layer, adapter.scaling) for module, layer in adapter.layers.items()}
    rank = max(len(lora_a) for lora_a, _ in factors.values())
    layers = {}
    for module, (lora_a, lora_b) in factors.items():
        missing = rank - len(lora_a)
        padded = F.pad(lora_a, (0, 0, 0, missing)).to(dtype), F.pad(lora_b, (0, missing)).to(dtype)
        if not all(factor.isfinite().all() for factor in padded):
            raise AdapterError(f"{module} overflows {dtype}: convert with --dtype float32 or bfloat16")
        layers[module] = padded
    patterns: Json = {"rank_pattern": {}, "alpha_pattern": {}}
    config: Json = {**adapter.config, **patterns, "r": rank, "lora_alpha": rank, "use_rslora": False}
    config["inference_mode"] = True
    head = {name: tensor.to(dtype) for name, tensor in adapter.head.items()}
    if head:
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in head})
    source: Json = {key: adapter.provenance[key] for key in ("base", "method") if key in adapter.provenance}
    provenance: Json = {**source, "dtype": str(dtype).removeprefix("torch.")}
    return LoraAdapter(layers, config, provenance, head)
