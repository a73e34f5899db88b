"""The chosen subspaces against a float64 reference."""

from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.calibration import Gram
from trainer.config import Subspace
from trainer.eigenspace import subspace


def random_gram(d: int, n: int, seed: int) -> Gram:
    y = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y *= torch.logspace(0, -3, d, dtype=torch.float64)
    return Gram(y.T @ y / n, n)


def energy(gram: Gram, q: torch.Tensor) -> float:
    return float(torch.trace(q.double().T @ gram.matrix @ q.double()))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@settings(deadline=None, max_examples=25)
@given(d=st.integers(2, 40), n=st.integers(1, 80), seed=st.integers(0, 99), data=st.data())
def test_every_subspace_is_orthonormal(d: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, d))
    kind = data.draw(st.sampled_from(get_args(Subspace)))
    q, _ = subspace(random_gram(d, n, seed), rank, kind, seeded())
    assert q.shape == (d, rank)
    torch.testing.assert_close(q.T @ q, torch.eye(rank), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(d=st.integers(3, 30), seed=st.integers(0, 99), data=st.data())
def test_tail_has_the_smallest_and_principal_the_largest_energy_of_all_subspaces(
    d: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, d - 1))
    gram = random_gram(d, 3 * d, seed)
    values = scipy.linalg.eigvalsh(gram.matrix.numpy())  # Ky Fan: the extremes of trace(Q^T C Q) are sums of these
    scale = values[-1]
    tail, principal = (subspace(gram, rank, kind, seeded())[0] for kind in ("tail", "principal"))
    np.testing.assert_allclose(energy(gram, tail), values[:rank].sum(), rtol=1e-3, atol=1e-9 * scale)
    np.testing.assert_allclose(energy(gram, principal), values[-rank:].sum(), rtol=1e-5)
    other = torch.linalg.qr(torch.randn(d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    assert energy(gram, tail) <= energy(gram, other) <= energy(gram, principal) + 1e-9 * scale


def test_middle_takes_the_eigenvectors_around_the_median() -> None:
    gram = Gram(torch.diag(torch.arange(10, dtype=torch.float64)), 1)
    q, _ = subspace(gram, 2, "middle", seeded())
    assert q.abs().sum(1).nonzero().flatten().tolist() == [4, 5]


def test_random_depends_on_the_generator_alone() -> None:
    first, second = (subspace(random_gram(8, 20, s), 3, "random", seeded())[0] for s in (1, 2))
    assert torch.equal(first, second)


def test_the_largest_entry_of_every_vector_is_positive() -> None:
    q, _ = subspace(random_gram(12, 50, 0), 5, "tail", seeded())
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_spectrum_of_a_known_matrix() -> None:
    matrix = torch.diag(torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float64))
    _, tail = subspace(Gram(matrix, 7), 2, "tail", seeded())
    _, principal = subspace(Gram(matrix, 7), 2, "principal", seeded())
    assert (tail.dimension, tail.n_tokens, tail.null_directions) == (4, 7, 2)
    assert tail.energy == 4.0
    assert tail.effective_rank == pytest.approx(2.0)
    assert tail.subspace_energy_share == 0.0
    assert principal.subspace_energy_share == pytest.approx(1.0)


def test_a_layer_whose_outputs_are_all_zero_still_gives_an_orthonormal_subspace() -> None:
    q, spectrum = subspace(Gram(torch.zeros(5, 5, dtype=torch.float64), 3), 2, "tail", seeded())
    torch.testing.assert_close(q.T @ q, torch.eye(2))
    assert spectrum.subspace_energy_share == 0.0
