"""What the report says of each layer: its name without the block, and how far training moved it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from converter.adapter_dir import AstraAdapter, AstraLayer
from trainer.report import Run
from trainer.start.eigenspace import Spectrum, effective_rank

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as data passes through
_NOTHING = 1e-5  # A0 or B0 this small beside its own change is round-off of zero: no change relative to it


@dataclass(frozen=True)
class Layer:
    """What is known of one layer; None where its method, or its run, left nothing to know it from."""

    name: str
    kind: str  # its name without the block, as short as the other kinds allow
    block: int
    shape: tuple[int, int]  # (d_out, d_in)
    rank: int
    found: Spectrum | None
    rank_before: float | None  # effective ranks of the outputs
    rank_after: float | None
    move_a: float | None  # |A - A0| / |A0|; None where A0 is zero
    move_b: float | None
    delta_norm: float  # |delta W|, Frobenius


def measure(run: Run, adapter: AstraAdapter) -> list[Layer]:
    """Return what is known of the layers, block after block."""
    kinds = kinds_of(list(adapter.layers))
    layers = []
    for name, layer in adapter.layers.items():
        before, after = run.start.eigenvalues.get(name), run.eigenvalues_after.get(name)
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
        layers.append(
            Layer(
                name=name,
                kind=kinds[name],
                block=int(numbers[0]) if numbers else 0,
                shape=(layer.b.shape[0], layer.a.shape[1]),
                rank=len(layer.a),
                found=run.start.spectra.get(name),
                rank_before=None if before is None else effective_rank(before.double()),
                rank_after=None if after is None else effective_rank(after.double()),
                move_a=_relative_move(layer.a, layer.a0),
                move_b=_relative_move(layer.b, layer.b0),
                delta_norm=delta_norm(layer, adapter.scaling),
            )
        )
    return sorted(layers, key=lambda layer: (layer.block, _place(layer.kind), layer.name))


def delta_norm(layer: AstraLayer, scaling: float) -> float:
    """Return the Frobenius norm of delta W = s (B A - B0 A0) = s (dB A + B0 dA), without forming it.

    As one product L R of 2r columns and rows its square is trace(L^T L R R^T); the second form loses no digits.
    """
    a, b, a0, b0 = (t.double() for t in (layer.a, layer.b, layer.a0, layer.b0))
    left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
    return scaling * float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _relative_move(now: torch.Tensor, start: torch.Tensor) -> float | None:
    moved, size = float((now.double() - start.double()).norm()), float(start.double().norm())
    return None if size <= _NOTHING * moved or size == 0 else moved / size


def kinds_of(names: Sequence[str]) -> dict[str, str]:
    """Return each name without its numbers, and without leading parts as long as the kinds stay different."""
    full = {name: ".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    kinds = set(full.values())
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
        short[kind] = next((end for end in ends if sum(f".{k}".endswith(f".{end}") for k in kinds) == 1), kind)
    return {name: short[kind] for name, kind in full.items()}


def _place(kind: str) -> tuple[int, str]:
    last = kind.rpartition(".")[2]
    return (_ORDER.index(last) if last in _ORDER else len(_ORDER), kind)
