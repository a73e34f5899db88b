"""How many ranks each target layer gets."""

import re
from collections.abc import Mapping

import torch

from trainer.config import TrainConfig
from trainer.errors import ConfigError, TargetError
from trainer.start.eigenspace import effective_rank

_MOST = 4  # times the mean rank: no layer gets more of a shared budget


def fixed_ranks(shapes: Mapping[str, tuple[int, int]], config: TrainConfig) -> dict[str, int]:
    """Return each layer's rank: of the last pattern in `rank_pattern` that its name matches, else `rank`.

    Raises ConfigError for a pattern that matches nothing, TargetError for a rank too large for a layer (d_out, d_in).
    """
    ranks = dict.fromkeys(shapes, config.rank)
    for pattern, rank in config.rank_pattern.items():
        matching = [name for name in shapes if re.search(pattern, name)]
        if not matching:
            raise ConfigError(f"rank_pattern {pattern!r} matches no target layer")
        ranks |= dict.fromkeys(matching, rank)
    for name, shape in shapes.items():
        if ranks[name] > min(shape):
            raise TargetError(
                f"rank {ranks[name]} is larger than layer {name} {shape}: lower rank, or set target_modules"
            )
    return ranks


def allocated_ranks(
    spectra: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]], config: TrainConfig
) -> dict[str, int]:
    """Share `rank` x layers among the layers by their eigenvalues (ascending, without those that are always zero).

    effective_rank: in proportion to the effective rank of a layer's outputs. tail_energy: always to the layer whose
    subspace grows by the smallest share of the layer's energy (principal: by the largest). Every layer gets 1 to
    4 x `rank`.
    """
    budget = config.rank * len(spectra)
    most = {name: min(_MOST * config.rank, *shapes[name]) for name in spectra}
    if config.rank_allocation == "effective_rank":
        cost = {name: _turns(effective_rank(values), most[name]) for name, values in spectra.items()}
    else:
        cost = {name: _energies(values, shapes[name], config, most[name]) for name, values in spectra.items()}
    # One rank each, then the cheapest of all next ones; costs rise within a layer, so this is a sort.
    offers = sorted((c, name) for name, costs in cost.items() for c in costs[1:].tolist())
    ranks = dict.fromkeys(spectra, 1)
    for _, name in offers[: budget - len(ranks)]:
        ranks[name] += 1
    return ranks


def _turns(weight: float, most: int) -> torch.Tensor:
    """Return costs under which the cheapest first gives out ranks in proportion to `weight` (Sainte-Lague)."""
    return (torch.arange(most, dtype=torch.float64) + 0.5) / max(weight, 1e-9)


def _energies(values: torch.Tensor, shape: tuple[int, int], config: TrainConfig, most: int) -> torch.Tensor:
    share = values.double() / values.sum().clamp(min=1e-300)
    if config.subspace == "principal":
        return -share.flip(0)[:most]
    return torch.cat([torch.zeros(max(0, shape[0] - len(values)), dtype=torch.float64), share])[:most]
