"""The tables, and with them every file that is drawn from the runs."""

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.methods import panels, starts
from benchmarks.methods.figures import all_figures
from benchmarks.methods.suite import CLASSES, FAMILIES, FIXED, OTHER, Suite
from benchmarks.methods.sweep import at_best, rate
from benchmarks.methods.trial import Results

COLUMNS = {
    "rate": "best rate",
    "seeds": "seeds",
    "test": "test loss",
    "spread": "±",
    "against_lora": "against LoRA",
    "against_lora_spread": "±",
    "metric": "right",
    "forgetting": "forgetting",
    "fixed": f"loss at {rate(FIXED):g}",
    "fixed_forgetting": "forgetting there",
}
LEGEND = f"""\
Mean over seeds at each method's own best learning rate, lowest loss first. Loss: nats per target token (topic: per
row) on test rows; the rate was chosen on validation rows. ±: standard deviation; `against LoRA` pairs the seeds,
which see the same rows in the same order. right: exact answers, or right classes. forgetting: loss on the base's
own text, after minus before. The last two columns are the paper's own protocol, one rate ({rate(FIXED):g}) for
all, one seed.
"""


def write(out: Path, suite: Suite, results: Results, console: Console) -> None:
    """Print the tables, and write them as `summary.md` and `summary.json`, and every figure, into `out`."""
    asked = [(suite.base, task) for task in FAMILIES] + [(suite.other_base, OTHER), (suite.encoder, CLASSES)]
    methods = [*starts.METHODS, *starts.TRIED]
    tables = {
        f"{task} on {base}": sorted(
            (case for method in methods if (case := _case(suite, results, base, task, method))),
            key=lambda case: case["test"],
        )
        for base, task in asked
    }
    cases = [case for found in tables.values() for case in found]
    if not cases:
        console.print("no method has all of its runs yet")
        return
    for title, found in tables.items():
        if found:
            console.print(_table(title, found))
    seconds = sum(results[trial].seconds for trial in results)
    told = {"runs": len(results), "hours_of_one_process": seconds / 3600} | {
        f"{case['base']}.{case['task']}.{case['method']}.test": case["test"] for case in cases
    }
    machines = {(env["machine"], env["device"], env["commit"]): env for env in results.environments}
    report.write(out / "summary.json", told, cases, {"runs_on": list(machines.values())})
    figures = all_figures(suite, results)
    for name, drawn in figures.items():
        panels.write(name, drawn, out)
    shown = [f"![{name}]({name}.png)" for name in figures if (out / f"{name}.png").exists()]
    text = [f"# Suite {suite.name}: {len(results)} runs", LEGEND, *(_markdown(t, f) for t, f in tables.items() if f)]
    (out / "summary.md").write_text("\n".join([*text, *shown]) + "\n", encoding="utf-8")
    console.print(f"{len(results)} runs ({seconds / 3600:.1f} hours of one process); tables and figures are in {out}")


def _case(suite: Suite, results: Results, base: str, task: str, method: str) -> dict[str, Any] | None:
    """Return a method's row; None while its search is not over."""
    sweep = suite.sweep(task, method, base)
    found = at_best(sweep, results)
    if not found:
        return None
    tests = [outcome.test for _, outcome in found]
    lora = {trial.seed: outcome.test for trial, outcome in at_best(suite.sweep(task, "lora", base), results)}
    pairs = [outcome.test / lora[trial.seed] - 1 for trial, outcome in found if trial.seed in lora]
    metrics = [outcome.metric for _, outcome in found if outcome.metric is not None]
    fixed = results.get(sweep.at(FIXED))
    return {
        "base": base,
        "task": task,
        "method": method,
        "rate": found[0][0].learning_rate,
        "seeds": len(found),
        "test": fmean(tests),
        "spread": _spread(tests),
        "against_lora": fmean(pairs) if pairs else None,
        "against_lora_spread": _spread(pairs),
        "metric": fmean(metrics) if metrics else None,
        "forgetting": fmean(outcome.forgetting for _, outcome in found),
        "fixed": fixed.test if fixed and math.isfinite(fixed.test) else None,
        "fixed_forgetting": fixed.forgetting if fixed and math.isfinite(fixed.test) else None,
        "parameters": found[0][1].parameters,
    }


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
    return [case["method"], *(_cell(key, case[key]) for key in COLUMNS)]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key == "metric":
        return f"{value:.0%}"
    if key.startswith("against_lora"):
        return f"{value:.1%}" if key.endswith("spread") else f"{value:+.1%}"
    return f"{value:g}" if key in ("rate", "seeds") else f"{value:.4f}" if key == "spread" else f"{value:.3f}"
