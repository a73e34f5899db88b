"""The r eigenvectors of a layer's Gram matrix that the adapter starts from (paper section 3.2)."""

from dataclasses import asdict, dataclass

import torch

from trainer.calibration import Gram
from trainer.config import Subspace


@dataclass(frozen=True)
class Spectrum:
    """What a layer's eigenvalues looked like, and what the chosen subspace holds of them; for the provenance."""

    dimension: int  # d_out
    n_tokens: int
    energy: float  # trace of C: the mean squared norm of an output
    subspace_energy_share: float  # the part of the trace inside the chosen subspace
    effective_rank: float  # exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007)
    null_directions: int  # eigenvalues that are zero in float32: there the tail is an arbitrary basis

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def subspace(gram: Gram, rank: int, kind: Subspace, generator: torch.Generator) -> tuple[torch.Tensor, Spectrum]:
    """Return Q (d_out, rank), orthonormal, float32, and the spectrum it was taken from.

    tail: the smallest eigenvalues (the paper's text). principal: the largest (the authors' code). middle: those
    around the median. random: a uniformly random subspace, drawn from `generator`. The largest entry of each vector
    is positive.
    """
    values, vectors = torch.linalg.eigh(gram.matrix)  # ascending
    values = values.clamp(min=0)
    d = len(values)
    start = {"tail": 0, "principal": d - rank, "middle": (d - rank) // 2}
    if kind == "random":
        q = torch.linalg.qr(torch.randn(d, rank, dtype=torch.float64, generator=generator)).Q
    else:
        q = vectors[:, start[kind] : start[kind] + rank]
    q = q * q.gather(0, q.abs().argmax(0, keepdim=True)).sign()
    return q.float(), _spectrum(gram, values, q)


def _spectrum(gram: Gram, values: torch.Tensor, q: torch.Tensor) -> Spectrum:
    total = values.sum()
    share = values[values > 0] / total
    return Spectrum(
        dimension=len(values),
        n_tokens=gram.n_tokens,
        energy=float(total),
        subspace_energy_share=float((q * (gram.matrix @ q)).sum() / total) if total > 0 else 0.0,
        effective_rank=float(torch.exp(-(share * share.log()).sum())),
        null_directions=int((values <= values[-1] * len(values) * torch.finfo(torch.float32).eps).sum()),
    )
