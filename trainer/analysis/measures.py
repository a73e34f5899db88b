"""Measurements of each layer for the report: its kind, effective ranks, and the size of its trained change."""

import re
from dataclasses import dataclass

import torch

from converter.adapter_dir import AstraAdapter, AstraLayer
from trainer.layer_kinds import kinds_of
from trainer.report import Run
from trainer.start.eigenspace import Spectrum, effective_rank

# in the order of the forward pass
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ROUND_OFF = 1e-5  # an A0 or B0 below this share of its change is zero up to round-off


@dataclass(frozen=True)
class Layer:
    """The measurements of one layer; None where the method or the run has not recorded the data."""

    name: str
    kind: str  # the name without the block number, as short as unambiguous
    block: int
    shape: tuple[int, int]  # (d_out, d_in)
    rank: int
    spectrum: Spectrum | None
    effective_rank_before: float | None  # of the outputs, before training
    effective_rank_after: float | None
    change_a: float | None  # |A - A0| / |A0| (Frobenius); None if A0 is zero
    change_b: float | None
    delta_norm: float  # |delta W|, Frobenius


def measure(run: Run, adapter: AstraAdapter) -> list[Layer]:
    """Return the measurements of all layers, in the order of blocks and of the forward pass."""
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
                spectrum=run.start.spectra.get(name),
                effective_rank_before=None if before is None else effective_rank(before.double()),
                effective_rank_after=None if after is None else effective_rank(after.double()),
                change_a=_relative_change(layer.a, layer.a0),
                change_b=_relative_change(layer.b, layer.b0),
                delta_norm=delta_norm(layer, adapter.scaling),
            )
        )
    return sorted(layers, key=lambda layer: (layer.block, _kind_order(layer.kind), layer.name))


def delta_norm(layer: AstraLayer, scaling: float) -> float:
    """Return the Frobenius norm of delta W = s (B A - B0 A0) = s (dB A + B0 dA), without computing delta W.

    The second form does not cancel. As a product L R of 2r columns and rows, its squared norm is trace(L^T L R R^T).
    """
    a, b, a0, b0 = (t.double() for t in (layer.a, layer.b, layer.a0, layer.b0))
    left, right = torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])
    return scaling * float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _relative_change(trained: torch.Tensor, start: torch.Tensor) -> float | None:
    change, size = float((trained.double() - start.double()).norm()), float(start.double().norm())
    return None if size <= _ROUND_OFF * change or size == 0 else change / size


def _kind_order(kind: str) -> tuple[int, str]:
    last = kind.rpartition(".")[2]
    return (_ORDER.index(last) if last in _ORDER else len(_ORDER), kind)
