"""Is the written LoRA the adapter that was read? Asked of the factors on disk, without the base.

delta W x, as the source defines it, against the stored product on random vectors, in float64. It knows nothing of how
the conversion got from one to the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from converter.adapter_dir import AdapterError, LoraAdapter
from converter.sources import Source
from converter.stored import Rank

VECTORS = 64
# Relative error of delta W that rounding may cause; bfloat16 has 8 bits: 0.2 % where nothing else goes wrong.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.01}


class NotTheAdapter(AdapterError):
    """What was written is not the adapter that was read."""


@dataclass(frozen=True)
class Errors:
    """Relative errors of the stored delta W (Frobenius), estimated from VECTORS random vectors."""

    layers: dict[str, float]
    total: float


def check_factors(
    source: Source, stored: LoraAdapter, rank: Rank, dtype: torch.dtype, on_layer: Callable[[], None]
) -> Errors:
    """Return the errors of the LoRA `stored`.

    Raises NotTheAdapter where they are more than rounding and `rank` explain. Random vectors estimate the norm: of what
    compression drops twice as much is allowed.
    """
    errors, wrong, whole = {}, 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for module, shape in source.shapes.items():
        x = torch.randn(shape.d_in, VECTORS, generator=generator, dtype=torch.float64)
        lora_a, lora_b = stored.layers[module]
        true = source.change(module, x)
        error = true - stored.scaling(module, len(lora_a)) * (lora_b.double() @ (lora_a.double() @ x))
        wrong, whole = wrong + float(error.square().sum()), whole + float(true.square().sum())
        errors[module] = float(error.norm() / true.norm()) if true.any() else float(error.norm())
        bound = BOUNDS[dtype] + 2 * rank.dropped.get(module, 0.0) ** 0.5
        if not errors[module] <= bound:
            advice = "convert with --dtype float32 or bfloat16" if dtype is torch.float16 else "report this"
            raise NotTheAdapter(
                f"{module!r} would be stored with an error of {errors[module]:.1%} in {dtype}, at most {bound:.1%} is "
                f"allowed: {advice}"
            )
        on_layer()
    return Errors(errors, (wrong / whole) ** 0.5 if whole else 0.0)
