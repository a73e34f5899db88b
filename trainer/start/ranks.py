"""The rank of each target layer: fixed by the settings, or allocated from a shared budget by the eigenvalues."""

import re
from collections.abc import Mapping

import torch

from trainer.config import TrainConfig
from trainer.errors import ConfigError, TargetError
from trainer.start.eigenspace import effective_rank

_MAX_FACTOR = 4  # maximum rank of a layer under a shared budget, in multiples of the mean rank


def fixed_ranks(shapes: Mapping[str, tuple[int, int]], config: TrainConfig) -> dict[str, int]:
    """Return the rank of each layer: that of the last matching pattern of `rank_pattern`, else `rank`.

    `shapes` maps names to (d_out, d_in). Raises ConfigError for a pattern without a match, and TargetError for a rank
    above min(d_out, d_in).
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
    """Return the rank of each layer under the budget of `rank` x number of layers; each layer gets 1 to 4 x `rank`.

    `spectra` holds the eigenvalues of each layer as `eigenspace.eigenvalues` returns them. effective_rank: ranks are in
    proportion to the effective rank of the layer's outputs. tail_energy: each next rank is given to the layer whose
    subspace then gains the smallest share of the layer's energy (the largest share for `principal`).
    """
    budget = config.rank * len(spectra)
    maximum = {name: min(_MAX_FACTOR * config.rank, *shapes[name]) for name in spectra}
    if config.rank_allocation == "effective_rank":
        cost = {name: _proportional_costs(effective_rank(values), maximum[name]) for name, values in spectra.items()}
    else:
        cost = {name: _energy_costs(values, shapes[name], config, maximum[name]) for name, values in spectra.items()}
    # Each layer gets one rank, then the cheapest next rank is chosen. Costs rise within a layer, so sorting is enough.
    candidates = sorted((c, name) for name, costs in cost.items() for c in costs[1:].tolist())
    ranks = dict.fromkeys(spectra, 1)
    for _, name in candidates[: budget - len(ranks)]:
        ranks[name] += 1
    return ranks


def _proportional_costs(weight: float, maximum: int) -> torch.Tensor:
    """Return the costs (maximum,) of a layer's ranks: choosing the cheapest gives shares in proportion to `weight`.

    The method is Sainte-Lague's.
    """
    return (torch.arange(maximum, dtype=torch.float64) + 0.5) / max(weight, 1e-9)


def _energy_costs(values: torch.Tensor, shape: tuple[int, int], config: TrainConfig, maximum: int) -> torch.Tensor:
    """Return the share of the layer's energy that each rank adds to its subspace (maximum,); negative for principal."""
    share = values.double() / values.sum().clamp(min=1e-300)
    if config.subspace == "principal":
        return -share.flip(0)[:maximum]
    return torch.cat([torch.zeros(max(0, shape[0] - len(values)), dtype=torch.float64), share])[:maximum]
