"""The best LoRA of a smaller rank: QR of both factors, then the SVD of the small matrix between them.

Of all matrices of rank k, the truncated SVD is nearest in the Frobenius norm (Eckart and Young, 1936). The energy that
it drops is the sum of the squares of the other singular values.
"""

from collections.abc import Iterable

import torch


def singular_values(lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """Return the singular values (k,) of lora_b (d_out, k) @ lora_a (k, d_in), descending, float64."""
    values: torch.Tensor = torch.linalg.svdvals(_r_factor(lora_b) @ _r_factor(lora_a.T).T)
    return values


def truncate(lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (k, d_in) and (d_out, k), float32, of the best approximation of lora_b @ lora_a with rank k.

    k is `rank`, or the shorter side of the weight if that is smaller. Each factor contains the square roots of the
    singular values, so that both have the same norm and both fit into 16-bit floats.
    """
    q_b, r_b = torch.linalg.qr(lora_b.double())
    q_a, r_a = torch.linalg.qr(lora_a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * (vt[:rank] @ q_a.T)).float(), (q_b @ u[:, :rank] * root).float()


def dropped_energy(values: torch.Tensor, rank: int) -> float:
    """Return the share of the squared singular values `values` after the first `rank`; 0 if all are zero."""
    energy = values.square()
    return float(energy[rank:].sum() / energy.sum()) if energy.any() else 0.0


def smallest_rank(layers: Iterable[torch.Tensor], energy: float) -> int:
    """Return the smallest rank with which every layer, given by its singular values, keeps the share `energy`."""
    return max(next(k for k in range(1, len(s) + 1) if dropped_energy(s, k) <= 1 - energy) for s in layers)


def total_dropped(layers: Iterable[torch.Tensor], rank: int) -> float:
    """Return the share of the whole adapter's energy after the first `rank` singular values of every layer."""
    energies = [values.square() for values in layers]
    total = sum(float(energy.sum()) for energy in energies)
    return sum(float(energy[rank:].sum()) for energy in energies) / total if total else 0.0


def _r_factor(matrix: torch.Tensor) -> torch.Tensor:
    r: torch.Tensor = torch.linalg.qr(matrix.double(), mode="r").R
    return r
