"""The r eigenvectors of a layer's output Gram matrix that the adapter starts from (paper section 3.2).

Only the vectors that are needed are computed. A layer with more outputs than inputs (gate, up) has C = W Cx W^T of rank
d_in at most: its Gram matrix is taken on the input side, and its tail is the left null space of W, where any
orthonormal basis is as good as another.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from trainer.config import Subspace
from trainer.start.calibration import Gram

_DENSE = 512  # up to this width a full decomposition costs less than it takes to avoid one
_SPARE = 16  # vectors that the Krylov block is wider than the rank
_TOLERANCE = 1e-3  # stop when a round improves the captured energy by less than this share


@dataclass(frozen=True)
class Spectrum:
    """What a layer's eigenvalues looked like, and what the chosen subspace holds of them; for the provenance."""

    dimension: int  # d_out
    rank: int
    n_tokens: int
    energy: float  # trace of C: the mean squared norm of an output
    subspace_energy_share: float  # the part of the trace inside the chosen subspace
    null_directions: int  # at least so many eigenvalues are zero: there the tail is an arbitrary basis
    start_norm: float  # |A0| / |W|: 0 where the tail is a null space of W

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def subspace(gram: Gram, weight: torch.Tensor, rank: int, kind: Subspace, generator: torch.Generator) -> torch.Tensor:
    """Return Q (d_out, rank), orthonormal, float32; `weight` is (d_out, d_in).

    tail: the smallest eigenvalues (the paper's text). principal: the largest (the authors' code). middle: those
    around the median. random: a uniformly random subspace, drawn from `generator`. The largest entry of each vector
    is positive.
    """
    d_out = len(weight)
    first = {"tail": 0, "principal": d_out - rank, "middle": (d_out - rank) // 2, "random": 0}[kind]
    if kind == "random":
        q = torch.linalg.qr(_gaussian(d_out, rank, gram.matrix, generator)).Q
    elif gram.of_inputs:
        q = _of_a_tall_layer(gram.matrix, weight.to(gram.matrix), first, rank, generator)
    else:
        q = _eigenvectors(gram.matrix, first, rank, generator)
    signed: torch.Tensor = q * q.gather(0, q.abs().argmax(0, keepdim=True)).sign()
    return signed.float().contiguous()


def spectrum(gram: Gram, weight: torch.Tensor, q: torch.Tensor) -> Spectrum:
    """Return what the subspace Q (d_out, rank) holds of a layer's outputs and of its `weight` (d_out, d_in)."""
    wide = q.to(gram.matrix)
    start = wide.T @ weight.to(wide)
    held = (start @ gram.matrix * start).sum() if gram.of_inputs else (wide * (gram.matrix @ wide)).sum()
    d_out, d_in = weight.shape
    return Spectrum(
        dimension=d_out,
        rank=q.shape[1],
        n_tokens=gram.n_tokens,
        energy=gram.energy,
        subspace_energy_share=float(held) / gram.energy if gram.energy > 0 else 0.0,
        null_directions=max(0, d_out - min(d_in, gram.n_tokens)),
        start_norm=float(start.norm() / weight.double().norm().clamp(min=1e-30)),
    )


def eigenvalues(gram: Gram, weight: torch.Tensor) -> torch.Tensor:
    """Return the min(d_out, d_in) eigenvalues of C that can differ from zero, ascending, float64."""
    matrix = gram.matrix
    if gram.of_inputs:  # W Cx W^T and R Cx R^T have the same ones, for W = (orthonormal columns) R
        r = torch.linalg.qr(weight.to(matrix), mode="r").R
        matrix = r @ matrix @ r.T
    values: torch.Tensor = torch.linalg.eigvalsh(matrix)
    return values.clamp(min=0).cpu()


def effective_rank(values: torch.Tensor) -> float:
    """Return exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007); 0 when all are zero."""
    share = values[values > 0] / values.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean squared cosine of the principal angles between two bases (d, r): 1 for one and the same space."""
    return float((first.T @ second).square().sum() / first.shape[1])


def _eigenvectors(c: torch.Tensor, first: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Return the eigenvectors first .. first + rank of c (d, d), in ascending order of their eigenvalues."""
    d = len(c)
    if d <= _DENSE or 0 < first < d - rank or 4 * rank > d:
        values, vectors = torch.linalg.eigh(c)
    elif first == 0:
        factor = _shifted_cholesky(c, _zero(c))
        values, vectors = _block_krylov(c, lambda x: torch.cholesky_solve(x, factor), rank, generator)
    else:
        values, vectors = _block_krylov(-c, lambda x: c @ x, rank, generator)
        values, vectors, first = -values.flip(0), vectors.flip(1), len(values) - rank
    return _with_settled_null_space(c, values, vectors, generator)[:, first : first + rank]


def _with_settled_null_space(
    c: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return `vectors` with those of zero eigenvalue replaced by a basis that round-off does not choose.

    Any basis of the null space would do; the projections of random vectors from `generator` are the same whatever
    device, or number of processes, added the Gram matrix up.
    """
    null = int((values <= _zero(c)).sum())
    basis = vectors[:, :null]
    settled = torch.linalg.qr(basis @ (basis.T @ _gaussian(len(c), null, c, generator))).Q
    return torch.cat([settled, vectors[:, null:]], dim=1)


def _block_krylov(
    c: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor], rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest Ritz values, ascending, and vectors of c in the span of x, step(x), step(step(x)), ...

    The span grows until the energy in the `rank` lowest vectors no longer falls.
    """
    x = torch.linalg.qr(_gaussian(len(c), rank + _SPARE, c, generator)).Q
    basis, image = x, c @ x
    energy, zero = float("inf"), _zero(c)
    while True:
        values, ritz = torch.linalg.eigh(basis.T @ image)
        before, energy = energy, float(values[:rank].sum())
        if before - energy <= _TOLERANCE * abs(energy) or abs(energy) <= zero or basis.shape[1] + x.shape[1] > len(c):
            return values[: x.shape[1]], basis @ ritz[:, : x.shape[1]]
        x = step(x)
        for _ in range(2):  # once leaves round-off that the next rounds would amplify
            x = torch.linalg.qr(x).Q
            x = x - basis @ (basis.T @ x)
        x = torch.linalg.qr(x).Q
        basis, image = torch.cat([basis, x], dim=1), torch.cat([image, c @ x], dim=1)


def _zero(c: torch.Tensor) -> float:
    """Return up to where an eigenvalue of c (d, d) is round-off."""
    return max(float(c.diagonal().sum().abs()), 1e-30) * len(c) * torch.finfo(c.dtype).eps


def _shifted_cholesky(c: torch.Tensor, shift: float) -> torch.Tensor:
    """Return the lower factor of c + shift; c may be singular, and the shift grows until round-off allows a factor."""
    while True:
        factor, failed = torch.linalg.cholesky_ex(c + shift * torch.eye(len(c), dtype=c.dtype, device=c.device))
        if not failed:
            return factor
        shift *= 10


def _of_a_tall_layer(
    cx: torch.Tensor, w: torch.Tensor, first: int, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the eigenvectors first .. first + rank of W Cx W^T for W (d_out, d_in) with d_out > d_in."""
    d_out, d_in = w.shape
    null = max(0, min(rank, d_out - d_in - first))  # so many of them lie in the left null space of W
    parts = []
    if null:
        parts.append(_left_null_vectors(w, null, generator))
    if null < rank:
        orthonormal, r = torch.linalg.qr(w)
        inside = max(0, first - (d_out - d_in))
        parts.append(orthonormal @ _eigenvectors(r @ cx @ r.T, inside, rank - null, generator))
    return torch.cat(parts, dim=1)


def _left_null_vectors(w: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Return n orthonormal vectors z (d_out, n) with z^T W = 0, from random ones by projecting out W's columns.

    The projection z - W (W^T W)^-1 W^T z is repeated, so that a factor of round-off quality is enough.
    """
    z = torch.linalg.qr(_gaussian(len(w), n, w, generator)).Q
    w32 = w.float()
    inner = w32.T @ w32
    factor = _shifted_cholesky(inner, max(float(inner.diagonal().sum()), 1e-30) * torch.finfo(inner.dtype).eps)
    for _ in range(10):
        seen = w.T @ z
        if seen.norm() <= 1e-9 * w.norm():
            break
        z = torch.linalg.qr(z - w @ torch.cholesky_solve(seen.float(), factor).double()).Q
    return z


def _gaussian(rows: int, columns: int, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(like)
