"""The subspace Q of a layer: r eigenvectors of its output Gram matrix C (paper section 3.2).

Only the needed vectors are computed. A layer with more outputs than inputs (gate, up) has C = W Cx W^T of rank d_in at
most, and its Gram matrix Cx is that of the inputs. Its tail is the left null space of W; every orthonormal basis of the
null space is equally good.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from trainer.config import Subspace
from trainer.start.calibration import Gram

_DENSE_LIMIT = 512  # widths up to this limit use a full decomposition, which is faster there
_OVERSAMPLING = 16  # width of the Krylov block minus the rank
_TOLERANCE = 1e-3  # the iteration stops when a round improves the captured energy by less than this share


@dataclass(frozen=True)
class Spectrum:
    """A summary of a layer's eigenvalues and of its subspace, recorded in `astra.json`."""

    dimension: int  # d_out
    rank: int
    n_tokens: int
    energy: float  # trace of C: the mean squared norm of an output
    subspace_energy_share: float  # trace(Q^T C Q) / trace(C)
    null_directions: int  # lower bound of the number of zero eigenvalues; among them the tail is an arbitrary basis
    start_norm: float  # |A0| / |W| (Frobenius): 0 where the tail is a null space of W

    def as_json(self) -> dict[str, float]:
        """Return the fields as a dictionary."""
        return asdict(self)


def subspace(gram: Gram, weight: torch.Tensor, rank: int, kind: Subspace, generator: torch.Generator) -> torch.Tensor:
    """Return Q (d_out, rank), orthonormal, float32, for a layer's Gram matrix and `weight` (d_out, d_in).

    tail: eigenvectors of the smallest eigenvalues (the paper's text). principal: of the largest (the authors' code).
    middle: of the eigenvalues around the median. random: a uniformly random subspace from `generator`. The sign of each
    vector is such that its largest entry is positive.
    """
    d_out = len(weight)
    first = {"tail": 0, "principal": d_out - rank, "middle": (d_out - rank) // 2, "random": 0}[kind]
    if kind == "random":
        q = torch.linalg.qr(_gaussian(d_out, rank, gram.matrix, generator)).Q
    elif gram.of_inputs:
        q = _eigenvectors_of_tall_layer(gram.matrix, weight.to(gram.matrix), first, rank, generator)
    else:
        q = _eigenvectors(gram.matrix, first, rank, generator)
    signed: torch.Tensor = q * q.gather(0, q.abs().argmax(0, keepdim=True)).sign()
    return signed.float().contiguous()


def spectrum(gram: Gram, weight: torch.Tensor, q: torch.Tensor) -> Spectrum:
    """Return the summary of a layer with `weight` (d_out, d_in) and subspace `q` (d_out, rank)."""
    q64 = q.to(gram.matrix)
    a0 = q64.T @ weight.to(q64)
    inside = (a0 @ gram.matrix * a0).sum() if gram.of_inputs else (q64 * (gram.matrix @ q64)).sum()  # trace(Q^T C Q)
    d_out, d_in = weight.shape
    return Spectrum(
        dimension=d_out,
        rank=q.shape[1],
        n_tokens=gram.n_tokens,
        energy=gram.energy,
        subspace_energy_share=float(inside) / gram.energy if gram.energy > 0 else 0.0,
        null_directions=max(0, d_out - min(d_in, gram.n_tokens)),
        start_norm=float(a0.norm() / weight.double().norm().clamp(min=1e-30)),
    )


def eigenvalues(gram: Gram, weight: torch.Tensor) -> torch.Tensor:
    """Return the min(d_out, d_in) eigenvalues of C that can be nonzero, ascending, float64, on the CPU."""
    matrix = gram.matrix
    if gram.of_inputs:  # with W = (orthonormal columns) R, R Cx R^T has the nonzero eigenvalues of W Cx W^T
        r = torch.linalg.qr(weight.to(matrix), mode="r").R
        matrix = r @ matrix @ r.T
    values: torch.Tensor = torch.linalg.eigvalsh(matrix)
    return values.clamp(min=0).cpu()


def effective_rank(values: torch.Tensor) -> float:
    """Return exp(entropy of the normalised eigenvalues) (Roy & Vetterli 2007); 0 when all are zero."""
    share = values[values > 0] / values.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean squared cosine of the principal angles between two bases (d, r): 1 for equal spaces."""
    return float((first.T @ second).square().sum() / first.shape[1])


def _eigenvectors(c: torch.Tensor, first: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Return the eigenvectors first .. first + rank of c (d, d), counted in ascending order of the eigenvalues."""
    d = len(c)
    if d <= _DENSE_LIMIT or 0 < first < d - rank or 4 * rank > d:
        values, vectors = torch.linalg.eigh(c)
    elif first == 0:
        factor = _shifted_cholesky(c, _round_off(c))
        values, vectors = _block_krylov(c, lambda x: torch.cholesky_solve(x, factor), rank, generator)
    else:
        values, vectors = _block_krylov(-c, lambda x: c @ x, rank, generator)
        values, vectors, first = -values.flip(0), vectors.flip(1), len(values) - rank
    return _with_reproducible_null_space(c, values, vectors, generator)[:, first : first + rank]


def _with_reproducible_null_space(
    c: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return `vectors` with another basis of the null space, one that does not depend on round-off.

    Every basis of the null space is equally good. The basis is made from projections of random vectors, so it is the
    same for each device and number of processes that sums up the Gram matrix.
    """
    null = int((values <= _round_off(c)).sum())
    basis = vectors[:, :null]
    reproducible = torch.linalg.qr(basis @ (basis.T @ _gaussian(len(c), null, c, generator))).Q
    return torch.cat([reproducible, vectors[:, null:]], dim=1)


def _block_krylov(
    c: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor], rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest Ritz values of c, ascending, and their vectors, from the span of x, step(x), step(step(x)), ...

    x is random. The span grows until the sum of the `rank` lowest values no longer falls.
    """
    x = torch.linalg.qr(_gaussian(len(c), rank + _OVERSAMPLING, c, generator)).Q
    basis, image = x, c @ x
    energy, zero = float("inf"), _round_off(c)
    while True:
        values, ritz = torch.linalg.eigh(basis.T @ image)
        previous, energy = energy, float(values[:rank].sum())
        if previous - energy <= _TOLERANCE * abs(energy) or abs(energy) <= zero or basis.shape[1] + x.shape[1] > len(c):
            return values[: x.shape[1]], basis @ ritz[:, : x.shape[1]]
        x = step(x)
        for _ in range(2):  # a single projection leaves round-off, which later rounds would amplify
            x = torch.linalg.qr(x).Q
            x = x - basis @ (basis.T @ x)
        x = torch.linalg.qr(x).Q
        basis, image = torch.cat([basis, x], dim=1), torch.cat([image, c @ x], dim=1)


def _round_off(c: torch.Tensor) -> float:
    """Return the value up to which an eigenvalue of c (d, d) is round-off."""
    return max(float(c.diagonal().sum().abs()), 1e-30) * len(c) * torch.finfo(c.dtype).eps


def _shifted_cholesky(c: torch.Tensor, shift: float) -> torch.Tensor:
    """Return the lower Cholesky factor of c + shift I; the shift grows until the factorisation succeeds."""
    while True:
        factor, failed = torch.linalg.cholesky_ex(c + shift * torch.eye(len(c), dtype=c.dtype, device=c.device))
        if not failed:
            return factor
        shift *= 10


def _eigenvectors_of_tall_layer(
    cx: torch.Tensor, w: torch.Tensor, first: int, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the eigenvectors first .. first + rank of W Cx W^T for W (d_out, d_in) with d_out > d_in."""
    d_out, d_in = w.shape
    null = max(0, min(rank, d_out - d_in - first))  # number of these vectors in the left null space of W
    parts = []
    if null:
        parts.append(_left_null_vectors(w, null, generator))
    if null < rank:
        orthonormal, r = torch.linalg.qr(w)
        inside = max(0, first - (d_out - d_in))
        parts.append(orthonormal @ _eigenvectors(r @ cx @ r.T, inside, rank - null, generator))
    return torch.cat(parts, dim=1)


def _left_null_vectors(w: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Return n orthonormal vectors z (d_out, n) with z^T W = 0.

    Random vectors are projected repeatedly, z - W (W^T W)^-1 W^T z, so that a float32 factor of W^T W is enough.
    """
    z = torch.linalg.qr(_gaussian(len(w), n, w, generator)).Q
    w32 = w.float()
    inner = w32.T @ w32
    factor = _shifted_cholesky(inner, max(float(inner.diagonal().sum()), 1e-30) * torch.finfo(inner.dtype).eps)
    for _ in range(10):
        residual = w.T @ z
        if residual.norm() <= 1e-9 * w.norm():
            break
        z = torch.linalg.qr(z - w @ torch.cholesky_solve(residual.float(), factor).double()).Q
    return z


def _gaussian(rows: int, columns: int, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(like)
