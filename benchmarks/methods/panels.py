"""Figures: rows of panels with plain numbers, written as JSON and drawn as PNG."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLOURS = {
    "before": "0.8",
    "lora": "C0",
    "pissa": "C1",
    "tail": "C2",
    "principal": "C3",
    "full": "black",
    "milora": "C4",
    "corda": "C5",
    "eva": "C6",
    "lora_ga": "C8",
    "mica": "C9",
    "random": "0.55",
    "middle": "C7",
    "tail_frozen": "lightgreen",
}


@dataclass(frozen=True)
class Panel:
    """One diagram with named lines of points (x, y)."""

    title: str
    x: str  # label of the axis
    y: str
    lines: Mapping[str, Sequence[tuple[Any, float]]]  # x is a word if the style is "words"
    log: Literal["", "x", "y", "xy"] = ""
    style: Literal["curve", "points", "words", "path"] = "curve"  # path: marks the last point of each line
    highest: float | None = None  # upper limit of the y axis


def write(name: str, panels: Sequence[Panel], out: Path) -> None:
    """Write `name`.json and `name`.png into `out`, or nothing if no panel has a point."""
    shown = [panel for panel in panels if any(panel.lines.values())]
    if not shown:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps([asdict(panel) for panel in shown]) + "\n", encoding="utf-8")
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.2 * rows), layout="constrained")
    for number, panel in enumerate(shown):
        _draw(figure.add_subplot(rows, columns, number + 1), panel)
    figure.savefig(out / f"{name}.png", dpi=90, metadata={"Software": None})


def _draw(axes: Any, panel: Panel) -> None:
    lines = {name: points for name, points in panel.lines.items() if points}
    for number, (name, points) in enumerate(lines.items()):
        xs, ys = zip(*points, strict=True)
        look = {"label": name, "color": _colour(name, number)}
        if panel.style == "words":
            axes.plot(range(len(xs)), ys, "o:", markersize=7, linewidth=0.6, **look)
            axes.set_xticks(range(len(xs)), xs)
        elif panel.style == "path":
            axes.plot(xs[:-1], ys[:-1], "o-", markersize=3, linewidth=0.7, alpha=0.5, color=look["color"])
            axes.plot(xs[-1:], ys[-1:], "o", markersize=7, **look)
            axes.annotate(name, (xs[-1], ys[-1]), xytext=(5, 4), textcoords="offset points", fontsize=8)
        else:
            axes.plot(xs, ys, "o-" if panel.style == "points" else "-", markersize=4, linewidth=1.2, **look)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if letter in panel.log:
            axes.set(**{f"{letter}scale": "log"})
            axis.set_major_formatter("{x:g}")
            low, high = axis.get_view_interval()
            if high > 10 * low:
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            labelled = letter == "y" or panel.style == "path"
            axis.set_minor_formatter("{x:g}" if labelled and high <= 10 * low else "")
    if panel.style == "path":
        marked = [points[-1] for points in lines.values()]
        _zoom(axes, marked)
        axes.set_xlim(0.6 * min(x for x, _ in marked), 1.25 * max(x for x, _ in marked))
        axes.tick_params(axis="x", which="both", labelsize=8)
    elif panel.style == "points" and "x" in panel.log:
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks[:: 1 + len(ticks) // 8], [f"{tick:g}" for tick in ticks[:: 1 + len(ticks) // 8]])
    if panel.highest is not None:
        axes.set_ylim(top=panel.highest)
    axes.grid(alpha=0.3)
    if panel.style != "path":
        axes.legend(fontsize=8)


def _zoom(axes: Any, points: Sequence[tuple[Any, float]]) -> None:
    """Set the y axis so that the differences between the points fill it, without negative values."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    if 0 < low < high:
        axes.set_ylim(max(0.0, low - 0.3 * (high - low)), high + 0.3 * (high - low))


def _colour(name: str, number: int) -> str:
    return COLOURS.get(name, f"C{number % 10}")
