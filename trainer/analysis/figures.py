"""The figures of the report, each a small SVG in a data URI.

A figure depends on its arguments only: the same numbers give the same bytes.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from trainer.config import Subspace
from trainer.loop import Point
from trainer.start.initialise import Estimate

_STYLE = {
    "svg.hashsalt": "astra",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_METRICS = {"eval_exact_match": "exact match (share of rows)", "eval_accuracy": "accuracy (share of rows)"}
_ROUND_OFF = 1e-12  # eigenvalues below this share of the largest of their kind lie outside the axes
_POINTS = 160  # evenly spaced points of a curve: more are not visible at this size and enlarge the file


@dataclass(frozen=True)
class Picture:
    """The attributes of an <img>: alternative text and source, a data URI."""

    alt: str
    source: str


@dataclass(frozen=True)
class Curve:
    """The spectrum of one layer: block number, d_out, rank, and the min(d_out, d_in) eigenvalues, ascending."""

    block: int
    dimension: int
    rank: int
    values: torch.Tensor


def training(
    curve: Sequence[Point],
    evaluations: Sequence[Mapping[str, float]],
    best_step: int | None,
    max_grad_norm: float,
    unit: str,
) -> list[Picture]:
    """Draw the loss (in `unit`), the gradient norm and the metrics of held-out rows, if any, against the step."""
    steps = [point.step for point in curve]
    width = 1 if len(steps) <= 1000 else 0.4
    evaluated = [e["step"] for e in evaluations]

    def loss(axes: Any) -> None:
        losses = [point.loss for point in curve]
        axes.plot(steps, losses, linewidth=width, label="training")
        if held_out := [e["eval_loss"] for e in evaluations]:
            axes.plot(evaluated, held_out, "o--", color="C1", linewidth=0.8, markersize=4, label="held out")
        _mark_best(axes, best_step)
        _set_log_scale(axes, losses + held_out)
        axes.set(title="Loss", xlabel="step", ylabel=f"loss ({unit})")

    def norms(axes: Any) -> None:
        values = [point.grad_norm for point in curve]
        axes.plot(steps, values, color="C2", linewidth=width, label="before clipping")
        axes.axhline(max_grad_norm, color="0.4", linestyle="--", linewidth=1, label=f"clipped to {max_grad_norm:g}")
        _set_log_scale(axes, [*values, max_grad_norm])
        axes.set(title="Gradient norm", xlabel="step", ylabel="norm over all trained parameters")

    drawn = [_picture("loss over the steps", loss), _picture("gradient norm over the steps", norms)]
    for key in [key for key in _METRICS if evaluations and all(key in e for e in evaluations)]:

        def metric(axes: Any, key: str = key) -> None:
            axes.plot(evaluated, [e[key] for e in evaluations], "o-", color="C1", markersize=4, label="held out")
            _mark_best(axes, best_step)
            axes.set(title="Metric", xlabel="step", ylabel=_METRICS[key], ylim=(-0.03, 1.03))

        drawn.append(_picture(f"{_METRICS[key]} over the steps", metric))
    return drawn


def subspace_range(subspace: Subspace, dimension: int, rank: int) -> range | None:
    """Return the indices (from 0) of a subspace's eigenvalues among all in ascending order; None for `random`."""
    if subspace == "random":
        return None
    first = {"tail": 0, "principal": dimension - rank, "middle": (dimension - rank) // 2}[subspace]
    return range(first, first + rank)


def spectra(kind: str, curves: Sequence[Curve], subspace: Subspace) -> Picture:
    """Draw the eigenvalues of the layers of one kind, one line per block, with the range of the subspace shaded.

    The d_out - d_in eigenvalues that are exactly zero have positions on the horizontal axis, but no line: the vertical
    axis is logarithmic.
    """
    blocks = sorted({curve.block for curve in curves})
    colours = matplotlib.colormaps["viridis"].resampled(256)
    largest = max(float(curve.values.max()) for curve in curves)

    def draw(axes: Any) -> None:
        named = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
        for curve in sorted(curves, key=lambda curve: curve.block):
            share = blocks.index(curve.block) / max(1, len(blocks) - 1)
            label = f"block {curve.block}" if curve.block in named else None
            named.discard(curve.block)
            zeros = curve.dimension - len(curve.values)
            at = _sampled(len(curve.values))
            axes.plot(at + zeros + 1, curve.values[at], color=colours(0.9 * share), linewidth=1, label=label)
        zeros = min(curve.dimension - len(curve.values) for curve in curves)
        if zeros:
            text = f"1 to {zeros}: zero (more outputs than inputs)"
            axes.axvspan(0.5, zeros + 0.5, facecolor="0.93", edgecolor="0.8", hatch="///", label=text, zorder=0)
        _shade_subspace(axes, curves, subspace, zeros)
        if largest > 0:
            axes.set(yscale="log")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], largest * _ROUND_OFF))
            axes.yaxis.set_minor_locator(NullLocator())  # slow to draw over ten decades
        axes.set(title=_escaped(kind), xlabel="eigenvalue number, ascending", ylabel="eigenvalue (mean squared output)")
        axes.set_xlim(0, max(curve.dimension for curve in curves) + 1)

    return _picture(f"eigenvalues of the outputs of {kind}, subspace: {subspace}", draw)


def by_block(title: str, unit: str, series: Mapping[str, Sequence[tuple[int, float]]], *, log: bool = False) -> Picture:
    """Draw named series of (block, value) against the block number. An empty series is not drawn, but uses a colour.

    With `log` the axis is logarithmic if the values span more than a factor of ten.
    """

    def draw(axes: Any) -> None:
        for number, (name, points) in enumerate(series.items()):
            if points:
                blocks, heights = zip(*sorted(points), strict=True)
                line, marker = ("-", "--", ":")[number // 10 % 3], "osD^v"[number % 5]
                style = {"color": f"C{number % 10}", "linestyle": line, "marker": marker, "linewidth": 1}
                axes.plot(blocks, heights, markersize=3.5 if len(points) <= 30 else 1.5, label=_escaped(name), **style)
        values = [value for points in series.values() for _, value in points]
        if not (log and _set_log_scale(axes, values)):
            axes.set_ylim(0, max(values) * 1.08 or 1)
        axes.set(title=_escaped(title), xlabel="block", ylabel=unit)

    return _picture(f"{title}: {unit} over the blocks", draw)


def convergence(estimates: Sequence[Estimate], threshold: float) -> Picture:
    """Draw the overlap of successive subspaces against the calibration tokens, and the threshold of the early stop.

    Each group of layers has its own line, because groups are calibrated one after the other.
    """

    def draw(axes: Any) -> None:
        for number, group in enumerate(by_group(estimates)):
            tokens = [estimate.n_tokens for estimate in group]
            for name, colour in (("median", "C0"), ("lowest", "C3")):
                label = f"{name} of the layers" if number == 0 else None
                axes.plot(tokens, [getattr(e, name) for e in group], "o-", color=colour, markersize=4, label=label)
        axes.axhline(threshold, color="0.4", linestyle="--", linewidth=1, label=f"calibration_overlap {threshold:g}")
        ticks = [estimate.n_tokens for estimate in max(by_group(estimates), key=len)][::-1]
        shown = ticks[:: -(-len(ticks) // 5)]
        axes.set(xscale="log", ylim=(0, 1.03), title="Overlap with the subspace of half the tokens")
        axes.set_xticks(shown, [f"{tick}" for tick in shown])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="calibration tokens (log)", ylabel="mean squared cosine")

    return _picture("overlap of successive subspaces over the calibration tokens", draw)


def by_group(estimates: Sequence[Estimate]) -> Iterator[Sequence[Estimate]]:
    """Yield the estimates of each group of layers; the count of tokens restarts with each group."""
    begin = 0
    for i in range(1, len(estimates) + 1):
        if i == len(estimates) or estimates[i].n_tokens <= estimates[i - 1].n_tokens:
            yield estimates[begin:i]
            begin = i


def _shade_subspace(axes: Any, curves: Sequence[Curve], subspace: Subspace, zeros: int) -> None:
    """Shade the widest and the narrowest range of the layers, with lines at the edges so that both are visible."""
    ranges = {r for curve in curves if (r := subspace_range(subspace, curve.dimension, curve.rank)) is not None}
    if not ranges:
        return
    ordered = sorted(ranges, key=lambda r: (len(r), r.start))
    narrow, wide = ordered[0], ordered[-1]
    label = f"{wide.start + 1} to {wide.stop}: {subspace} subspace"
    if narrow != wide:
        label = f"{subspace} subspace, rank {len(narrow)} to {len(wide)}"
    if wide.stop <= zeros:
        label += ", all zero"
    for r, text in {narrow: None, wide: label}.items():
        axes.axvspan(r.start + 0.5, r.stop + 0.5, color="C3", alpha=0.25, linewidth=1.5, label=text)


def _mark_best(axes: Any, step: int | None) -> None:
    if step is not None:
        axes.axvline(step, color="C3", linestyle=":", linewidth=1.5, label=f"best step, {step}: weights of the result")


def _set_log_scale(axes: Any, values: Sequence[float]) -> bool:
    """Use a log axis if the values span more than a factor of ten; return whether they do."""
    wide = min(values) > 0 and max(values) > 10 * min(values)
    if wide:
        axes.set(yscale="log")
        axes.yaxis.set_major_formatter(_number)  # powers of ten alone may give only one or two labels
        axes.yaxis.set_minor_formatter(_two_or_five if max(values) < 100 * min(values) else "")
    return wide


def _number(value: float, _position: int | None) -> str:
    return f"{value:g}"


def _two_or_five(value: float, position: int | None) -> str:
    return _number(value, position) if f"{value:e}"[0] in "25" else ""


def _sampled(n: int) -> torch.Tensor:
    """Return up to _POINTS + 80 ascending indices below n, denser at both ends, where spectra curve most."""
    even = torch.linspace(0, n - 1, min(n, _POINTS)).round().long()
    near = torch.logspace(0, torch.tensor(float(n)).log10().item(), 40).long().clamp(max=n) - 1
    return torch.tensor(sorted({*even.tolist(), *near.tolist(), *(n - 1 - near).tolist()}))


def _escaped(text: str) -> str:
    """Return the text with its dollar signs escaped: matplotlib would read it as a formula."""
    return text.replace("$", r"\$")


def _picture(alt: str, draw: Callable[[Any], None]) -> Picture:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw(axes)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=1.6)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(alt, f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}")
