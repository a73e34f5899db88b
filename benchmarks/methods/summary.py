"""The tables, and with them every file that is drawn from the runs."""

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
from benchmarks.methods.suite import ANSWERS, FEW, FIXED, TASKS, Suite
from benchmarks.methods.sweep import at_best, rate
from benchmarks.methods.trial import Results

COLUMNS = {
    "rate": "best rate",
    "test": "test loss",
    "spread": "±",
    "against_lora": "against LoRA",
    "metric": "right",
    "forgetting": "forgetting",
    "fixed": f"loss at {rate(FIXED):g}",
    "fixed_forgetting": "forgetting there",
}


def write(out: Path, suite: Suite, results: Results, console: Console) -> None:
    """Print the tables and write `summary.json` and every figure into `out`."""
    cases = []
    asked: list[tuple[str, str, Iterable[str]]] = [
        (suite.base, task, [*starts.METHODS, *starts.TRIED]) for task in TASKS
    ]
    asked += [
        (suite.base, ANSWERS, FEW),
        (suite.other_base, "python", FEW),
        (suite.encoder, "topic", [*FEW, "random"]),
    ]
    for base, task, methods in asked:
        found = [case for method in methods if (case := _case(suite, results, base, task, method))]
        lora = next((case["test"] for case in found if case["method"] == "lora"), None)
        for case in found:
            case["against_lora"] = case["test"] / lora - 1 if lora else None
        cases += found
        if found:
            console.print(_table(f"{task} on {base}: {found[0]['seeds']} seeds at the best rate", found))
    if not cases:
        console.print("no method has all of its runs yet")
        return
    seconds = sum(results[trial].seconds for trial in results)
    told = {"runs": len(results), "hours_of_one_process": seconds / 3600} | {
        f"{case['base']}.{case['task']}.{case['method']}.test": case["test"] for case in cases
    }
    machines = {(env["machine"], env["device"], env["commit"]): env for env in results.environments}
    report.write(out / "summary.json", told, cases, {"runs_on": list(machines.values())})
    for name, drawn in all_figures(suite, results).items():
        panels.write(name, drawn, out)
    console.print(f"{len(results)} runs ({seconds / 3600:.1f} hours of one process); tables and figures are in {out}")


def _case(suite: Suite, results: Results, base: str, task: str, method: str) -> dict[str, Any] | None:
    """Return a method's row; None while its search is not over."""
    sweep = suite.sweep(task, method, base)
    found = at_best(sweep, results)
    if not found:
        return None
    tests = [outcome.test for _, outcome in found]
    metrics = [outcome.metric for _, outcome in found if outcome.metric is not None]
    fixed = results.get(sweep.at(FIXED))
    return {
        "base": base,
        "task": task,
        "method": method,
        "rate": found[0][0].learning_rate,
        "seeds": len(found),
        "test": fmean(tests),
        "spread": stdev(tests) if len(tests) > 1 else None,
        "metric": fmean(metrics) if metrics else None,
        "forgetting": fmean(outcome.forgetting for _, outcome in found),
        "fixed": fixed.test if fixed and math.isfinite(fixed.test) else None,
        "fixed_forgetting": fixed.forgetting if fixed and math.isfinite(fixed.test) else None,
        "parameters": found[0][1].parameters,
    }


def _table(title: str, cases: list[dict[str, Any]]) -> Table:
    table = Table("method", *COLUMNS.values(), title=title)
    for case in sorted(cases, key=lambda case: case["test"]):
        table.add_row(case["method"], *(_cell(key, case[key]) for key in COLUMNS))
    return table


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key in ("against_lora", "metric"):
        return f"{value:+.1%}" if key == "against_lora" else f"{value:.0%}"
    return f"{value:g}" if key == "rate" else f"{value:.4f}" if key == "spread" else f"{value:.3f}"
