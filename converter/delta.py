"""The algebra: an Astra adapter's weight change as one LoRA, without cancellation.

    delta W = s (B A - B0 A0) = s (dB A + B0 dA)       with dA = A - A0, dB = B - B0

The textbook form [B | -B0] [A ; A0] is a difference of two large products: stored in bfloat16 it loses the small change
between them (24 % error of delta W when the adapter moved by 1 %). In the second form every factor is as small as the
change itself, and the error is bfloat16's own rounding, 0.2 %.
"""

import torch

from converter.adapter_dir import AstraLayer


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
