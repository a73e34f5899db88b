"""Check that the written LoRA is the adapter that was read, from its stored factors and without the base.

The check multiplies random vectors x by delta W, once as the source defines it and once by the stored factors, in
float64. It shares no code with the conversion of one into the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from converter.adapter_dir import AdapterError, LoraAdapter
from converter.source import Source
from converter.stored import Rank

N_VECTORS = 64
# Relative error of delta W that rounding may cause; bfloat16 has 8 significant bits: 0.2 % is usual.
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.01}


class VerificationFailed(AdapterError):
    """The written LoRA, or the model with it, differs from the adapter that was read."""


@dataclass(frozen=True)
class FactorErrors:
    """Relative errors of the stored delta W (Frobenius norm), estimated from N_VECTORS random vectors."""

    layers: dict[str, float]
    total: float


def check_factors(
    source: Source, stored: LoraAdapter, rank: Rank, dtype: torch.dtype, on_layer: Callable[[], None]
) -> FactorErrors:
    """Return the errors of the LoRA `stored`; `on_layer` is called after each layer.

    Raises VerificationFailed if a layer's error is larger than rounding to `dtype` and the compression to `rank`
    explain. Random vectors only estimate a norm, so twice the norm that compression drops is allowed.
    """
    errors, error_energy, total_energy = {}, 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for module, shape in source.shapes.items():
        x = torch.randn(shape.d_in, N_VECTORS, generator=generator, dtype=torch.float64)
        lora_a, lora_b = stored.layers[module]
        exact = source.apply_delta(module, x)
        error = exact - stored.scaling(module, len(lora_a)) * (lora_b.double() @ (lora_a.double() @ x))
        error_energy += float(error.square().sum())
        total_energy += float(exact.square().sum())
        errors[module] = float(error.norm() / exact.norm()) if exact.any() else float(error.norm())
        bound = MAX_ERROR[dtype] + 2 * rank.dropped.get(module, 0.0) ** 0.5
        if not errors[module] <= bound:
            advice = "convert with --dtype float32 or bfloat16" if dtype is torch.float16 else "please report this bug"
            raise VerificationFailed(
                f"{module!r} would be stored with an error of {errors[module]:.1%} in {dtype}, at most {bound:.1%} is "
                f"allowed: {advice}"
            )
        on_layer()
    return FactorErrors(errors, (error_energy / total_energy) ** 0.5 if total_energy else 0.0)
