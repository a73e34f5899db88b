"""Ranks by pattern, and ranks under a shared budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import TrainConfig
from trainer.errors import ConfigError, TargetError
from trainer.start.ranks import allocated_ranks, fixed_ranks

SHAPES = {"a.q_proj": (32, 32), "a.up_proj": (48, 32), "b.q_proj": (32, 32)}


def test_the_last_matching_pattern_wins() -> None:
    config = TrainConfig(rank=4, rank_pattern={"q_proj": 2, "^b": 8})
    assert fixed_ranks(SHAPES, config) == {"a.q_proj": 2, "a.up_proj": 4, "b.q_proj": 8}


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(ConfigError, match="'k_proj' matches no target layer"):
        fixed_ranks(SHAPES, TrainConfig(rank_pattern={"k_proj": 2}))


def test_a_rank_above_the_layers_size_is_refused() -> None:
    with pytest.raises(TargetError, match=r"rank 33 is larger than layer a\.q_proj \(32, 32\)"):
        fixed_ranks(SHAPES, TrainConfig(rank=33))


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 999),
    layers=st.integers(1, 9),
    rank=st.integers(1, 8),
    rule=st.sampled_from(["effective_rank", "tail_energy"]),
    kind=st.sampled_from(["tail", "principal"]),
)
def test_the_ranks_sum_to_the_budget_with_1_to_4_times_the_mean_each(
    seed: int, layers: int, rank: int, rule: str, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = {str(i): torch.rand(40, generator=generator).sort().values for i in range(layers)}
    config = TrainConfig(rank=rank, rank_allocation=rule, subspace=kind)
    ranks = allocated_ranks(spectra, dict.fromkeys(spectra, (40, 40)), config)
    assert sum(ranks.values()) == rank * layers
    assert all(1 <= found <= 4 * rank for found in ranks.values())


def test_a_layer_with_a_higher_effective_rank_gets_a_higher_rank() -> None:
    flat, steep = torch.ones(64), torch.logspace(-6, 0, 64)
    config = TrainConfig(rank=8, rank_allocation="effective_rank")
    ranks = allocated_ranks({"flat": flat, "steep": steep}, {"flat": (64, 64), "steep": (64, 64)}, config)
    assert ranks["flat"] > 2 * ranks["steep"]


def test_a_layer_whose_subspace_has_less_energy_gets_a_higher_rank() -> None:
    flat, steep = torch.ones(64), torch.logspace(-6, 0, 64)
    shapes = {"flat": (64, 64), "steep": (64, 64)}
    for kind, more, less in (("tail", "steep", "flat"), ("principal", "steep", "flat")):
        config = TrainConfig(rank=8, rank_allocation="tail_energy", subspace=kind)
        ranks = allocated_ranks({"flat": flat, "steep": steep}, shapes, config)
        assert ranks[more] > ranks[less], kind
