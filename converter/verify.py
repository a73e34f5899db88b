"""Verification of a conversion: the written LoRA against the adapter, and the served model against the trained one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from converter import adapter_dir
from converter.adapter_dir import AdapterError, Json
from converter.check_factors import VerificationFailed, check_factors
from converter.source import Source
from converter.stored import DTYPES, Rank, stored_lora

if TYPE_CHECKING:
    from converter.check_model import Comparison


def compare(
    source: Source, base: Path | None, dtype: torch.dtype, prompts: Sequence[str], wanted: bool
) -> "Comparison | str":
    """Return the base and the trained model on the prompts, or the reason why they are not compared.

    Without `prompts` the default ones are used. `dtype` is that of the factors, in which the models are computed if the
    base's own is unusual. Raises AdapterError.
    """
    if not wanted:
        return "--no-verify was given"
    from converter import check_model  # imports transformers, which takes seconds

    reason = check_model.reason_not_comparable(source, base)
    if base is None or reason:
        return reason or ""
    served = DTYPES.get(adapter_dir.base_dtype(base), dtype)
    return check_model.Comparison(source, base, served, prompts or check_model.DEFAULT_PROMPTS)


def is_enough(
    source: Source, dtype: torch.dtype, comparison: "Comparison | str", max_kl: float, tried: list[Json], rank: Rank
) -> bool:
    """Return whether the KL with `rank` is at most `max_kl`, and append what was measured to `tried`."""
    if isinstance(comparison, str):
        raise AdapterError(f"--rank auto has to compare the models, but {comparison}: give --rank a number")
    found = comparison.agreement(comparison.served(stored_lora(source, rank, dtype)))
    figures = {"dropped_energy": rank.total_dropped, **asdict(found)}
    tried.append({"rank": rank.stored, **_all_rounded(figures)})
    return found.mean_kl <= max_kl


def verify(
    new: Path,
    source: Source,
    rank: Rank,
    dtype: torch.dtype,
    comparison: "Comparison | str",
    max_kl: float,
    on_layer: Callable[[], None],
) -> Json:
    """Read the LoRA in `new` back and check it; return the fields of the provenance that the checks measured.

    They are `errors`, and `verification` and `probe`, or `unverified` with the reason. Raises AdapterError.
    """
    stored = adapter_dir.load_lora(new)
    errors = check_factors(source, stored, rank, dtype, on_layer)
    found: Json = {"errors": {"relative": _rounded(errors.total), "layers": _all_rounded(errors.layers)}}
    if rank.dropped:
        found["errors"]["dropped_energy"] = _rounded(rank.total_dropped)
        found["errors"]["dropped_energy_by_layer"] = _all_rounded(rank.dropped)
    if isinstance(comparison, str):
        return {**found, "unverified": comparison}
    served = comparison.served(stored)
    agreement = comparison.agreement(served)
    if not agreement.mean_kl <= max_kl:
        raise VerificationFailed(
            f"the served model would differ from the trained one by {agreement.mean_kl:.2g} nats per token (KL), above "
            f"the limit of {max_kl:g}; the adapter's effect is {agreement.effect:.2g}: keep a larger rank, or raise "
            "--max-kl"
        )
    return {**found, "verification": _all_rounded(asdict(agreement)), "probe": comparison.probe(served)}


def _rounded(figure: float) -> float:
    """Return a measured figure with three significant digits: machines differ in the others."""
    return float(f"{figure:.3g}")


def _all_rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figure if isinstance(figure, int) else _rounded(figure) for name, figure in figures.items()}
