"""The subspaces and spectra, compared with float64 references."""

from typing import get_args

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Subspace
from trainer.start import eigenspace
from trainer.start.calibration import Gram
from trainer.start.eigenspace import effective_rank, eigenvalues, overlap, spectrum, subspace


def random_gram(d: int, n: int, seed: int) -> Gram:
    y = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y *= torch.logspace(0, -3, d, dtype=torch.float64)
    return gram_of(y.T @ y / n, n)


def gram_of(matrix: torch.Tensor, n: int, *, of_inputs: bool = False, energy: float | None = None) -> Gram:
    return Gram(matrix, n, float(matrix.trace()) if energy is None else energy, of_inputs)


def subspace_of(gram: Gram, rank: int, kind: Subspace) -> torch.Tensor:
    """Return the subspace of a square layer; it does not depend on the weight."""
    return subspace(gram, torch.eye(len(gram.matrix)), rank, kind, seeded())


def energy(gram: Gram, q: torch.Tensor) -> float:
    return float(torch.trace(q.double().T @ gram.matrix @ q.double()))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@settings(deadline=None, max_examples=25)
@given(d=st.integers(2, 40), n=st.integers(1, 80), seed=st.integers(0, 99), data=st.data())
def test_every_subspace_is_orthonormal(d: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, d))
    kind = data.draw(st.sampled_from(get_args(Subspace)))
    q = subspace_of(random_gram(d, n, seed), rank, kind)
    assert q.shape == (d, rank)
    torch.testing.assert_close(q.T @ q, torch.eye(rank), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=25)
@given(d=st.integers(3, 30), seed=st.integers(0, 99), data=st.data())
def test_tail_has_the_least_and_principal_the_most_energy(d: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, d - 1))
    gram = random_gram(d, 3 * d, seed)
    values = scipy.linalg.eigvalsh(gram.matrix.numpy())  # Ky Fan: their sums are the extremes of trace(Q^T C Q)
    scale = values[-1]
    tail, principal = (subspace_of(gram, rank, kind) for kind in ("tail", "principal"))
    np.testing.assert_allclose(energy(gram, tail), values[:rank].sum(), rtol=1e-3, atol=1e-9 * scale)
    np.testing.assert_allclose(energy(gram, principal), values[-rank:].sum(), rtol=1e-5)
    other = torch.linalg.qr(torch.randn(d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    assert energy(gram, tail) <= energy(gram, other) <= energy(gram, principal) + 1e-9 * scale


def test_middle_is_the_eigenvectors_around_the_median() -> None:
    gram = gram_of(torch.diag(torch.arange(10, dtype=torch.float64)), 1)
    q = subspace_of(gram, 2, "middle")
    assert q.abs().sum(1).nonzero().flatten().tolist() == [4, 5]


def test_random_depends_on_the_generator_only() -> None:
    first, second = (subspace_of(random_gram(8, 20, s), 3, "random") for s in (1, 2))
    assert torch.equal(first, second)


def test_the_largest_entry_of_every_vector_is_positive() -> None:
    q = subspace_of(random_gram(12, 50, 0), 5, "tail")
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_spectrum_of_a_known_matrix() -> None:
    gram = gram_of(torch.diag(torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float64)), 3)
    weight = torch.diag(torch.tensor([3.0, 0.0, 4.0, 0.0]))
    tail, principal = (spectrum(gram, weight, subspace_of(gram, 2, kind)) for kind in ("tail", "principal"))
    assert (tail.dimension, tail.rank, tail.n_tokens, tail.null_directions) == (4, 2, 3, 1)
    assert tail.energy == 4.0
    assert tail.subspace_energy_share == 0.0
    assert principal.subspace_energy_share == pytest.approx(1.0)
    assert (tail.start_norm, principal.start_norm) == (pytest.approx(0.6), pytest.approx(0.8))
    assert effective_rank(eigenvalues(gram, weight)) == pytest.approx(2.0)


def test_zero_outputs_give_an_orthonormal_subspace() -> None:
    gram = gram_of(torch.zeros(5, 5, dtype=torch.float64), 3)
    q = subspace_of(gram, 2, "tail")
    torch.testing.assert_close(q.T @ q, torch.eye(2))
    assert spectrum(gram, torch.eye(5), q).subspace_energy_share == 0.0


def power_law_gram(d: int, n: int, seed: int = 0) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(n, d, dtype=torch.float64, generator=generator) / torch.arange(1, d + 1).sqrt()
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    return gram_of((y @ rotation).T @ (y @ rotation) / n, n)


@pytest.mark.parametrize("n", [4000, 900, 300], ids=["many tokens", "few tokens", "fewer tokens than outputs"])
@pytest.mark.parametrize("kind", ["tail", "principal"])
def test_the_iterative_solver_has_the_energy_of_the_full_decomposition(n: int, kind: Subspace) -> None:
    gram = power_law_gram(600, n)  # above the limit of the dense solver
    assert len(gram.matrix) > eigenspace._DENSE_LIMIT
    values = scipy.linalg.eigvalsh(gram.matrix.numpy())
    best = values[:16].sum() if kind == "tail" else values[-16:].sum()
    assert energy(gram, subspace_of(gram, 16, kind)) == pytest.approx(best, rel=0.01, abs=1e-12 * values[-1])


@pytest.mark.parametrize("kind", ["tail", "principal"])
@pytest.mark.parametrize("d", [100, 600], ids=["dense", "iterative"])
def test_round_off_does_not_change_the_subspace(d: int, kind: Subspace) -> None:
    gram = power_law_gram(d, d // 2)  # half of the eigenvalues are zero, so their basis is arbitrary
    noise = torch.randn(d, d, dtype=torch.float64, generator=seeded()) * 1e-17
    noisy = gram_of(gram.matrix + noise + noise.T, gram.n_tokens)
    assert overlap(subspace_of(gram, 4, kind), subspace_of(noisy, 4, kind)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["tail", "principal", "middle"])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(48, 32, 4), (40, 32, 12), (700, 96, 16)])
def test_the_subspace_of_a_tall_layer_is_that_of_its_outputs(d_out: int, d_in: int, rank: int, kind: Subspace) -> None:
    weight = torch.randn(d_out, d_in, dtype=torch.float64, generator=seeded()).float()
    inputs = random_gram(d_in, 200, 1).matrix
    outputs = weight.double() @ inputs @ weight.double().T
    gram = gram_of(inputs, 200, of_inputs=True, energy=float(outputs.trace()))
    q = subspace(gram, weight, rank, kind, seeded()).double()
    values = scipy.linalg.eigvalsh(outputs.numpy())
    first = {"tail": 0, "principal": d_out - rank, "middle": (d_out - rank) // 2}[kind]
    best = values[first : first + rank].sum()
    assert float((q * (outputs @ q)).sum()) == pytest.approx(best, rel=1e-3, abs=1e-9 * values[-1])
    torch.testing.assert_close(q.T @ q, torch.eye(rank, dtype=torch.float64), atol=1e-5, rtol=0)
    np.testing.assert_allclose(eigenvalues(gram, weight), values[-d_in:], rtol=1e-6, atol=1e-9 * values[-1])
    held = spectrum(gram, weight, q.float()).subspace_energy_share
    assert held == pytest.approx(best / values.sum(), rel=1e-3, abs=1e-9)
    if kind == "tail" and rank <= d_out - d_in:
        assert (q.T @ weight.double()).norm() < 1e-6 * weight.norm()  # the left null space of W: A0 = 0


def test_the_tail_of_a_rank_deficient_weight_is_in_its_null_space() -> None:
    weight = torch.zeros(48, 32)
    weight[:, :5] = torch.randn(48, 5, generator=seeded())
    gram = gram_of(torch.eye(32, dtype=torch.float64), 100, of_inputs=True, energy=float(weight.square().sum()))
    q = subspace(gram, weight, 8, "tail", seeded())
    assert (q.T @ weight).norm() < 1e-5 * weight.norm()


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles() -> None:
    axes = torch.eye(4)
    assert overlap(axes[:, :2], axes[:, [1, 0]]) == 1.0
    assert overlap(axes[:, :2], axes[:, 1:3]) == 0.5
    assert overlap(axes[:, :2], axes[:, 2:]) == 0.0


def test_the_effective_rank_of_equal_eigenvalues_is_their_number() -> None:
    assert effective_rank(torch.tensor([0.0, 3.0, 3.0, 3.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(3)) == 0
