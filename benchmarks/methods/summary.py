"""The tables and figures of the runs."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.methods import panels, starts
from benchmarks.methods.figures import all_figures
from benchmarks.methods.suite import CLASSES, FAMILIES, FIXED, OTHER, Suite
from benchmarks.methods.sweep import SEEDS, at_best, at_rate, rate
from benchmarks.methods.trial import Outcome, Results

COLUMNS = {
    "rate": "best rate",
    "test": "test loss",
    "against_lora": "against LoRA",
    "against_random": "against random",
    "metric": "right",
    "forgetting": "forgetting",
    "fixed": f"loss at {rate(FIXED):g}",
    "fixed_against_lora": "against LoRA",
    "fixed_forgetting": "forgetting",
}
LEGEND = f"""\
Means over {len(SEEDS)} seeds at the best learning rate of each method, lowest loss first. Loss: nats per target token
(topic: per row) on test rows; the rate was chosen by the loss on validation rows with one seed. ±: standard deviation
over seeds, not over the choice of the rate. `against` LoRA, or Astra's random subspace: relative difference of the
losses, seed by seed, because a seed has the same rows in the same order for all methods. right: share of exact answers
or right classes. forgetting: loss on text like that of the base's pre-training, after minus before. The last three
columns follow the paper's protocol, one learning rate ({rate(FIXED):g}) for all methods.
"""


def write(out: Path, suite: Suite, results: Results, console: Console) -> None:
    """Print the tables, and write `summary.md`, `summary.json` and all figures into the folder `out`."""
    pairs = [(suite.base, task) for task in FAMILIES] + [(suite.other_base, OTHER), (suite.encoder, CLASSES)]
    methods = [*starts.METHODS, *starts.TRIED]
    tables = {
        f"{task} on {base}": sorted(
            (case for method in methods if (case := _case(suite, results, base, task, method))),
            key=lambda case: math.inf if case["test"] is None else case["test"],
        )
        for base, task in pairs
    }
    cases = [case for found in tables.values() for case in found]
    if not cases:
        console.print("no method has finished all of its runs yet")
        return
    for title, found in tables.items():
        if found:
            console.print(_table(title, found))
    seconds = sum(results[trial].seconds for trial in results)
    headline = {"runs": len(results), "hours_of_one_process": seconds / 3600} | {
        f"{case['base']}.{case['task']}.{case['method']}.test": case["test"] for case in cases
    }
    machines = {(env["machine"], env["device"], env["commit"]): env for env in results.environments}
    report.write(out / "summary.json", headline, cases, {"runs_on": list(machines.values())})
    figures = all_figures(suite, results)
    for name, figure in figures.items():
        panels.write(name, figure, out)
    shown = [f"![{name}]({name}.png)" for name in figures if (out / f"{name}.png").exists()]
    text = [f"# Suite {suite.name}: {len(results)} runs", LEGEND, *(_markdown(t, f) for t, f in tables.items() if f)]
    (out / "summary.md").write_text("\n".join([*text, *shown]) + "\n", encoding="utf-8")
    console.print(f"{len(results)} runs ({seconds / 3600:.1f} hours of one process); tables and figures are in {out}")


def _case(suite: Suite, results: Results, base: str, task: str, method: str) -> dict[str, Any] | None:
    """Return a method's row of the table, or None if not all of its runs are finished."""
    sweep = suite.sweep(task, method, base)
    best = at_best(sweep, results)
    if len(best) < len(SEEDS):
        return None
    every = [outcome for _, outcome in best]
    found = [outcome for outcome in every if math.isfinite(outcome.test)]

    def at_best_of(other: str) -> list[Outcome]:
        return [outcome for _, outcome in at_best(suite.sweep(task, other, base), results)]

    fixed = at_rate(sweep.at(FIXED), results)
    fixed_lora = at_rate(suite.sweep(task, "lora", base).at(FIXED), results)
    return {
        "base": base,
        "task": task,
        "method": method,
        "rate": best[0][0].learning_rate,
        "diverged": len(every) - len(found),
        "test": _mean(outcome.test for outcome in found),
        "test_spread": _spread([outcome.test for outcome in found]),
        **_against("lora", every, at_best_of("lora")),
        **_against("random", every, at_best_of("random")),
        "metric": _mean(outcome.metric for outcome in found if outcome.metric is not None),
        "forgetting": _mean(outcome.forgetting for outcome in found),
        "fixed": _mean(outcome.test for outcome in fixed),
        **{f"fixed_{key}": value for key, value in _against("lora", fixed, fixed_lora).items()},
        "fixed_forgetting": _mean(outcome.forgetting for outcome in fixed),
        "parameters": found[0].parameters if found else 0,
    }


def _against(name: str, ours: list[Outcome], theirs: list[Outcome]) -> dict[str, float | None]:
    """Return mean and standard deviation of the loss relative to that of method `name`, seed by seed, minus 1."""
    pairs = [a.test / b.test - 1 for a, b in zip(ours, theirs, strict=False) if math.isfinite(a.test + b.test)]
    return {f"against_{name}": _mean(pairs), f"against_{name}_spread": _spread(pairs)}


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean of the finite values, or None if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def _spread(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _table(title: str, cases: list[dict[str, Any]]) -> Table:
    table = Table("method", *COLUMNS.values(), title=title)
    for case in cases:
        table.add_row(*_row(case))
    return table


def _markdown(title: str, cases: list[dict[str, Any]]) -> str:
    rows = [["method", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1), *map(_row, cases)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(case: dict[str, Any]) -> list[str]:
    return [case["method"], *(_cell(key, case) for key in COLUMNS)]


def _cell(key: str, case: dict[str, Any]) -> str:
    value, spread = case[key], case.get(f"{key}_spread")
    if value is None:
        return ""
    if key == "rate":
        return f"{value:g}" + (f" ({case['diverged']} diverged)" if case["diverged"] else "")
    if key == "metric":
        return f"{value:.0%}"
    if "against" in key:
        return f"{100 * value:+.1f}" + (f" ± {100 * spread:.1f} %" if spread is not None else " %")
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
