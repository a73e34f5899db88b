"""Compression is the optimum of Eckart and Young, and reports the energy that it drops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.compress import dropped_energy, singular_values, smallest_rank, total_dropped, truncate
from converter.delta import delta_weight
from converter.stored import choose_rank
from tests.converter.handmade import make_adapter, make_layer, source_of, to_lora


def factors(d_out: int, d_in: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -3, rank)
    return torch.randn(rank, d_in, generator=generator), spectrum * torch.randn(d_out, rank, generator=generator)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.data())
def test_the_truncation_equals_that_of_a_dense_float64_svd(d_out: int, d_in: int, rank: int, data) -> None:
    a, b = factors(d_out, d_in, rank, seed=d_out)
    kept = data.draw(st.integers(1, min(rank, d_out, d_in)))
    dense = b.double() @ a.double()
    s = torch.linalg.svdvals(dense)
    small_a, small_b = truncate(a, b, kept)
    assert small_a.shape == (kept, d_in)
    assert small_b.shape == (d_out, kept)
    error = (dense - small_b.double() @ small_a.double()).norm()
    optimum = s[kept:].norm()
    assert error <= optimum + 1e-5 * s.norm()
    values = singular_values(a, b)
    torch.testing.assert_close(values[: len(s)][:kept], s[: len(values)][:kept], rtol=1e-8, atol=1e-12 * float(s[0]))
    assert dropped_energy(values, kept) == pytest.approx(float(optimum**2 / s.norm() ** 2), abs=1e-9)


def test_no_nearby_lora_of_the_same_rank_is_a_better_approximation() -> None:
    a, b = factors(30, 20, 8, seed=0)
    dense = b.double() @ a.double()
    small_a, small_b = (t.double() for t in truncate(a, b, 3))
    best = (dense - small_b @ small_a).norm()
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        other_a = small_a + 1e-3 * torch.randn(small_a.shape, generator=generator, dtype=torch.float64)
        other_b = dense @ torch.linalg.pinv(other_a)  # the best B for this A
        assert (dense - other_b @ other_a).norm() > best


def test_both_truncated_factors_have_the_same_norms() -> None:
    a, b = factors(30, 20, 8, seed=0)
    small_a, small_b = truncate(1e-4 * a, b, 3)
    torch.testing.assert_close(small_a.norm(dim=1), small_b.norm(dim=0), rtol=1e-4, atol=0)


def test_the_smallest_rank_keeps_the_energy_in_every_layer() -> None:
    layers = [singular_values(*factors(40, 40, 8, seed)) for seed in range(3)]
    for energy in (0.5, 0.9, 0.999, 1.0):
        rank = smallest_rank(layers, energy)
        assert all(dropped_energy(s, rank) <= 1 - energy for s in layers)
        assert rank == 1 or any(dropped_energy(s, rank - 1) > 1 - energy for s in layers)


def test_a_zero_change_drops_no_energy() -> None:
    zero = singular_values(torch.zeros(4, 8), torch.zeros(8, 4))
    assert dropped_energy(zero, 1) == 0
    assert smallest_rank([zero], 0.999) == 1
    assert total_dropped([zero], 1) == 0


def test_the_dropped_energy_of_each_layer_is_reported() -> None:
    layers = {"a": make_layer(48, 32, 4, 0.1), "b": make_layer(32, 48, 4, 0.1, seed=1)}
    adapter = make_adapter(layers)
    rank = choose_rank(source_of(adapter), 5)
    lora = to_lora(adapter, torch.float32, rank=5)
    assert lora.config["r"] == lora.config["lora_alpha"] == rank.stored == 5
    dropped = total = 0.0
    for module, layer in layers.items():
        exact, (a, b) = delta_weight(layer, 1.0), lora.layers[module]
        square = float((exact - b.double() @ a.double()).square().sum())
        assert rank.dropped[module] == pytest.approx(square / float(exact.square().sum()), rel=1e-3)
        dropped, total = dropped + square, total + float(exact.square().sum())
    assert rank.total_dropped == pytest.approx(dropped / total, rel=1e-3)


def test_fit_engine_raises_the_rank_to_one_of_the_engine_and_at_most_to_the_exact_one() -> None:
    source = source_of(make_adapter({"m": make_layer(64, 64, 20, 0.1)}))
    assert choose_rank(source, fit_engine=True, energy=0.5).stored in (8, 16, 32)
    assert choose_rank(source, 9, fit_engine=True).stored == 16
    assert choose_rank(source, fit_engine=True, energy=1.0).stored == 40
    assert choose_rank(source, 1000).stored == 40
