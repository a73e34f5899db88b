"""How much time and memory does the initialisation of an 8B model need, compared with other initialisations?

    python -m benchmarks.init_cost --out FILE.json [--quick] [--models llama-3-8b qwen3-8b] [--rivals keep_everything]
    python -m benchmarks.init_cost --redraw FILE.json

The contestants:

    ours               `trainer.start.initialise` with its defaults, rank 16, without recorded spectra, as the others
    ours_with_spectra  the same with recorded spectra
    keep_everything    the plain form: all output Gram matrices at once in float32, a full eigendecomposition of each,
                       A0 = Q^T W
    corda, eva         PEFT's implementations
    eigensolver        only the tail eigenvectors of q_proj's Gram matrix, compared with `torch.linalg.eigh`

One decoder layer is measured (see `initialisers.py`) on 128 x 128 tokens; HOW describes how its figures are
extrapolated to all layers. The contestants take turns. Each run has a process of its own that has warmed up on a tiny
model; peak memory is the kernel's high-water mark minus model and tokens (Linux). `ours` runs three times, `eva` twice;
`keep_everything` and `corda` take minutes and run once; medians count. Run no other program at the same time: threads
that wait for each other made a run 30 times as long (`busy_percent_before` and `cpu_s` in the JSON show it).

With --rivals only those contestants are measured, and `ours` if FILE.json has no figures for it. Other figures in
FILE.json with the same shapes are kept, with the time of their measurement. The plot is written beside the JSON file.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import report
from benchmarks.initialisers import EVA_PASSES, GIB, MODELS, RANK, SEED, Shape, in_a_process
from trainer.config import TrainConfig
from trainer.start.calibration import layer_groups

REPEATS = {"ours": 3, "ours_with_spectra": 3, "keep_everything": 1, "corda": 1, "eva": 2, "eigensolver": 3}
MEMORY_GIB = (1, 2, 4, 8, 16, 32)  # limits for the Gram matrices: a higher one makes fewer groups of layers
QUICK_HEAD_DIM = 24  # 768 wide: the narrowest layers for which the same code runs
TARGETS = {"keep_everything.time_ratio": 3, "keep_everything.peak_memory_ratio": 10}
_OURS = (
    "time: layers x measured, plus one layer's forward pass for each further group of layers that calibration_memory "
    "makes; peak: measured, with the Gram matrices of the largest group in place of those of one layer, plus A0 and B0 "
    "of the other layers and, with several groups, one layer's bfloat16 output for all tokens"
)
HOW = {
    "ours": _OURS,
    "ours_with_spectra": _OURS,
    "keep_everything": "time: layers x measured; peak: measured, plus Gram matrices, A0 and B0 of the other layers",
    "corda": "time: layers x measured; peak: measured, plus what PEFT keeps of the other layers until the last is "
    "finished: covariance of the inputs, uncropped U, S, V (in main memory even with a GPU), A and B",
    "eva": "time: layers x measured, if no layer needs more passes to converge than the measured one (limit: "
    f"{EVA_PASSES}); peak: measured, plus components, means, variances, A, B of the other layers: PEFT keeps no matrix",
}
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write or to extend")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="default: both; with --quick: llama-3-8b")
    parser.add_argument("--rivals", nargs="+", choices=tuple(REPEATS), help="contestants to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="smoke run: much narrower layers, one run each")
    parser.add_argument("--redraw", type=Path, metavar="FILE.json", help="only draw the plot of an existing result")
    args = parser.parse_args()
    if args.redraw:
        plot(json.loads(args.redraw.read_text(encoding="utf-8")), args.redraw.with_suffix(".png"))
        return 0
    if not args.out:
        parser.error("--out FILE.json is needed")
    shapes = {name: shape.smaller(QUICK_HEAD_DIM) if args.quick else shape for name, shape in MODELS.items()}
    rows = earlier(args.out, shapes)
    todo = turns(args.models or list(MODELS)[: 1 if args.quick else None], args.rivals, set(rows), once=args.quick)
    run(todo, shapes, rows, args.out)
    result = json.loads(args.out.read_text(encoding="utf-8"))
    show(result)
    plot(result, args.out.with_suffix(".png"))
    return 0


def earlier(out: Path, shapes: Mapping[str, Shape]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rows of an existing result file `out` with these shapes, by (model, contestant)."""
    rows = json.loads(out.read_text(encoding="utf-8"))["cases"] if out.exists() else []
    return {(row["model"], row["contestant"]): row for row in rows if row["shape"] == asdict(shapes[row["model"]])}


def turns(
    models: list[str], rivals: list[str] | None, measured: set[tuple[str, str]], *, once: bool
) -> list[tuple[str, str]]:
    """Return the order of the runs as (model, contestant): for each model all contestants once, then the repetitions.

    `ours` is added for a model if it is neither among `rivals` nor in `measured`.
    """
    found = []
    for model in models:
        # q_proj's Gram matrix is the same in both models.
        chosen = rivals or [name for name in REPEATS if name != "eigensolver" or model == models[0]]
        if "ours" not in chosen and (model, "ours") not in measured and chosen != ["eigensolver"]:
            chosen = ["ours", *chosen]
        found += [
            (model, name) for i in range(max(REPEATS.values())) for name in chosen if i < (1 if once else REPEATS[name])
        ]
    return found


def run(
    todo: list[tuple[str, str]], shapes: Mapping[str, Shape], rows: dict[tuple[str, str], dict[str, Any]], out: Path
) -> None:
    """Measure in the order of `todo`, and write `out` after each run: all of them take hours and may be interrupted."""
    env = report.environment(SEED)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in todo}
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(todo))
        for model, contestant in todo:
            bar.update(task, description=f"{model}: {contestant}")
            found = runs[model, contestant]
            busy = psutil.cpu_percent(1)
            if busy > 10:
                console.print(f"[yellow]other programs use {busy:.0f} % of the cores: the times are not reliable[/]")
            found.append(in_a_process(shapes[model], contestant) | {"busy_percent_before": busy})
            rows[model, contestant] = row(model, contestant, shapes[model], found, env)
            report.write(out, summarise(list(rows.values())), list(rows.values()), env)
            bar.advance(task)


def row(
    model: str, contestant: str, shape: Shape, runs: list[dict[str, float]], env: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the results of a contestant: medians, figures for all layers, every repetition."""
    one = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    found: dict[str, Any] = {"model": model, "contestant": contestant, "rank": RANK, "shape": asdict(shape)}
    if contestant == "eigensolver":
        found |= _short(one)
    else:
        found |= _short(one | whole_model(contestant, one, shape, int(TrainConfig().calibration_memory)))
        found["extrapolation"] = HOW[contestant]
    if contestant == "ours":
        found["by_calibration_memory_gib"] = {
            str(size): _short(whole_model(contestant, one, shape, size * GIB)) for size in MEMORY_GIB
        }
    return found | {"repetitions": [_short(run) for run in runs], "time": env["time"], "commit": env["commit"]}


def whole_model(contestant: str, one: Mapping[str, float], shape: Shape, memory: int) -> dict[str, float]:
    """Return seconds and peak memory (GiB) for all layers from the figures `one` of one layer (see HOW).

    `memory` is the limit for our Gram matrices in bytes.
    """
    seconds = shape.layers * one["seconds"]
    peak = one["peak_gib"] + (shape.layers - 1) * kept_per_layer(contestant, shape) / GIB
    if HOW[contestant] is not _OURS:
        return {"whole_s": seconds, "whole_peak_gib": peak}
    (few, small), (many, large) = (groups(shape, layers, memory) for layers in (1, shape.layers))
    pass_s = one["forward_s"] * one["passes"] / few  # calibration may stop before the last batch
    return {
        "whole_s": seconds + (many - few) * pass_s,  # the layer in which a group ends is computed twice
        "whole_peak_gib": peak + (large - small + (many > few) * 2 * shape.rows * shape.length * shape.hidden) / GIB,
        "groups": many,
    }


def kept_per_layer(contestant: str, shape: Shape) -> int:
    """Return the bytes that are kept per layer until the last one is finished (see HOW); ours without Gram matrices."""
    each = shape.linear().values()
    kept = {
        "keep_everything": sum(4 * d_out**2 for d_out, _ in each),
        "corda": sum(4 * (d_in**2 + min(d_out, d_in) * (d_out + d_in + 1)) for d_out, d_in in each),
        "eva": sum((4 * RANK + 2 * 8) * d_in for _, d_in in each),  # means and variances are float64
    }
    return kept.get(contestant, 0) + sum(4 * RANK * (d_out + d_in) for d_out, d_in in each)


def groups(shape: Shape, layers: int, memory: int) -> tuple[int, int]:
    """Return the number of groups that `memory` makes of `layers` decoder layers, and the Gram bytes of the largest."""
    every = {f"{i}.{name}": sizes for i in range(layers) for name, sizes in shape.linear().items()}
    found = list(layer_groups(every, memory))
    return len(found), max(sum(8 * min(every[name]) ** 2 for name in group) for group in found)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return time and peak memory for all layers, and their ratios to `ours`, under model.contestant.figure.

    The figures of the eigensolver have keys of their own.
    """
    found: dict[str, Any] = {}
    base = {row["model"]: row for row in rows if row["contestant"] == "ours"}
    for row in rows:
        if row["contestant"] == "eigensolver":
            found["eigensolver_speedup"] = row["full_s"] / row["subset_s"]
            found["eigensolver_speedup_over_float32"] = row["full_float32_s"] / row["subset_s"]
            found["eigensolver_excess_energy"] = row["excess_energy"]
            continue
        key, mine = _key(row), base.get(row["model"], {})
        found |= {f"{key}.time_s": row["whole_s"], f"{key}.peak_gib": row["whole_peak_gib"]}
        if mine and mine is not row:
            found[f"{key}.time_ratio"] = row["whole_s"] / mine["whole_s"]
            found[f"{key}.one_layer_time_ratio"] = row["seconds"] / mine["seconds"]
            found[f"{key}.peak_memory_ratio"] = row["whole_peak_gib"] / mine["whole_peak_gib"]
    return _short(found) | {"targets": TARGETS}


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['model']}.{row['contestant']}".replace("-", "_")


def _short(figures: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.5g}") for key, value in figures.items()}


def show(result: dict[str, Any]) -> None:
    summary, rows = result["summary"], [row for row in result["cases"] if "whole_s" in row]
    names = ("1 layer, s", "GiB", "all layers, s", "GiB", "time / ours", "peak / ours")
    table = Table("model", "contestant", title="initialisation, measured on one layer")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        ratios = [summary.get(f"{_key(row)}.{kind}_ratio", 1) for kind in ("time", "peak_memory")]
        figures = [row[key] for key in ("seconds", "peak_gib", "whole_s", "whole_peak_gib")]
        table.add_row(row["model"], row["contestant"], *(f"{figure:,.2f}" for figure in figures + ratios))
    Console(width=max(console.width, 110)).print(table)
    for row in (row for row in rows if row["contestant"] == "ours"):
        for size, found in row["by_calibration_memory_gib"].items():
            figures = f"{found['groups']:.0f} groups, {found['whole_s']:,.0f} s, {found['whole_peak_gib']:.1f} GiB"
            console.print(f"{row['model']}, ours with calibration_memory={size}GiB: {figures}", highlight=False)
    for name, how in {row["contestant"]: row["extrapolation"] for row in rows}.items():
        console.print(f"all layers, {name}: {how}", highlight=False)
    console.print_json(json.dumps({key: value for key, value in summary.items() if key.startswith("eigensolver")}))


def plot(result: dict[str, Any], out: Path) -> None:
    """Draw time and peak memory for all layers, one bar per contestant."""
    rows = [row for row in result["cases"] if "whole_s" in row]
    models, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "contestant"))
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    figures = {"whole_s": "seconds, all layers", "whole_peak_gib": "peak memory without the model, GiB, all layers"}
    for axis, (key, label) in zip(axes, figures.items(), strict=True):
        for k, name in enumerate(names):
            chosen = [row for row in rows if row["contestant"] == name]
            places = [models.index(row["model"]) + 0.85 * ((k + 0.5) / len(names) - 0.5) for row in chosen]
            bars = axis.bar(places, [row[key] for row in chosen], 0.8 / len(names), label=name.replace("_", " "))
            axis.bar_label(bars, fmt="{:,.0f}" if key == "whole_s" else "{:.3g}", fontsize=7)
        axis.set_xticks(range(len(models)), models)
        axis.set_yscale("log")
        axis.margins(y=0.15)
        axis.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    env = result["env"]
    figure.suptitle(f"initialisation, rank {RANK}, {env['cores']} cores of {env['machine']}; measured on one layer")
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
