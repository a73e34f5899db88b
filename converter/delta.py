"""The algebra: the weight change of an Astra adapter as one LoRA, without cancellation.

    delta W = s (B A - B0 A0) = s (dB A + B0 dA)       with dA = A - A0, dB = B - B0

The textbook form [B | -B0] [A ; A0] is a difference of two large products: in bfloat16 it loses the small change
between them (24 % of delta W if training changed the factors by 1 %). In the second form each product is as small as
the change, and the error is the rounding of bfloat16, 0.2 %. `python -m benchmarks.convert` measures both.
"""

import torch

from converter.adapter_dir import AstraLayer


def delta_weight(layer: AstraLayer, scaling: float) -> torch.Tensor:
    """Return delta W (d_out, d_in) in float64: the reference for all other forms."""
    a, b, a0, b0 = (t.double() for t in (layer.a, layer.b, layer.a0, layer.b0))
    return scaling * (b @ a - b0 @ a0)


def lora_factors(layer: AstraLayer, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lora_A (k, d_in) and lora_B (d_out, k) in float32 with lora_B @ lora_A = delta W.

    k is 2r. It is r if B was not trained (delta W = s B0 dA) or if B0 is zero (delta W = s B A).
    """
    d_a, d_b = layer.a - layer.a0, layer.b - layer.b0
    if not d_b.any():
        return d_a, scaling * layer.b0
    if not layer.b0.any():
        return layer.a, scaling * d_b
    return torch.cat([layer.a, d_a]), scaling * torch.cat([d_b, layer.b0], dim=1)
