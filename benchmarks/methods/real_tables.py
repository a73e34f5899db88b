"""Tables and figures of the suite on real models (`benchmarks.methods.real`)."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.methods import panels
from benchmarks.methods.real import (
    CORE,
    FIXED,
    NLU,
    OURS,
    REST,
    TASKS,
    calibrated,
    searches_of,
    sweep,
    with_spectra,
)  # fmt: skip
from benchmarks.methods.sweep import at_best, at_rate, rate
from benchmarks.methods.trial import Outcome, Results


def write(out: Path, results: Results, console: Console) -> None:
    """Print the tables, and write `summary.json`, `frontier.json` and `frontier.png` into the folder `out`."""
    cases = [case for task in (*TASKS, *NLU, OURS) for case in _cases(task, results)]
    for task in (*TASKS, *NLU, OURS):
        _print(task, [case for case in cases if case["task"] == task], console)
    more = [*_spectra(results), *_calibration(results)]
    _print_more(more, console)
    headline = {"runs": len(results)} | {
        f"{case['task']}.{case['method']}.{key}": case[key]
        for case in cases
        for key in ("test", "metric", "forgetting")
    }
    machines = {(env["machine"], env["device"], env["commit"]): env for env in results.environments}
    report.write(out / "summary.json", headline, [*cases, *more], {"runs_on": list(machines.values())})
    panels.write("frontier", [_frontier(task, results) for task in (*TASKS, OURS)], out)
    seconds = sum(results[trial].seconds for trial in results)
    console.print(f"{len(results)} runs ({seconds / 3600:.1f} hours); tables and figures are in {out}")


def _cases(task: str, results: Results) -> list[dict[str, Any]]:
    """Return the methods of a task whose best rate is known, the lowest loss first: mean and spread over the seeds."""
    found = []
    for method, search in searches_of(task).items():
        best = at_best(search, results)
        outcomes = [outcome for _, outcome in best if math.isfinite(outcome.test)]
        if not outcomes:
            continue
        at_fixed = at_rate(search.at(FIXED), results)
        found.append(
            {
                "task": task,
                "method": method,
                "rate": best[0][0].learning_rate,
                "seeds": len(best),
                "parameters": outcomes[0].parameters,
                **_measured("test", [o.test for o in outcomes]),
                **_measured("metric", [o.metric for o in outcomes if o.metric is not None]),
                **_measured("forgetting", [o.forgetting for o in outcomes]),
                **_measured("fixed", [o.test for o in at_fixed]),
                **_measured("fixed_forgetting", [o.forgetting for o in at_fixed]),
            }
        )
    return sorted(found, key=lambda case: case["test"])


def _measured(name: str, values: list[float]) -> dict[str, float | None]:
    finite = [value for value in values if math.isfinite(value)]
    return {name: fmean(finite) if finite else None, f"{name}_spread": stdev(finite) if len(finite) > 1 else None}


def _print(task: str, cases: list[dict[str, Any]], console: Console) -> None:
    if not cases:
        return
    columns = (
        "best rate",
        "seeds",
        "test loss",
        "right answers",
        "forgetting",
        f"loss at {rate(FIXED):g}",
        "forgetting",
    )
    table = Table("method", *columns, title=f"{task}: means over seeds, losses in nats")
    for case in cases:
        keys = ("test", "metric", "forgetting", "fixed", "fixed_forgetting")
        table.add_row(case["method"], f"{case['rate']:g}", str(case["seeds"]), *(_cell(case, key) for key in keys))
    console.print(table)


def _cell(case: dict[str, Any], key: str) -> str:
    value, spread = case[key], case[f"{key}_spread"]
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def _frontier(task: str, results: Results) -> panels.Panel:
    """Return test loss against forgetting, over the learning rates of each method, its best rate marked."""
    lines = {}
    for method in (*CORE, *REST):
        search = sweep(task, method)
        best = search.best(results)
        done = [results[trial] for trial in search.trials(results) if trial in results]
        marked = [results[best]] if best else []
        path = [(o.forgetting, o.test) for o in (*sorted(done, key=_forgotten), *marked) if math.isfinite(o.test)]
        if path:
            lines[method] = path
    label = "forgetting: loss on the base's own text, after - before"
    return panels.Panel(f"{task}: test loss and forgetting", label, "test loss", lines, "xy", style="path")


def _forgotten(outcome: Outcome) -> float:
    return outcome.forgetting


def _spectra(results: Results) -> list[dict[str, Any]]:
    """Return by task and method the share of layers whose effective rank rose, and the median of after / before."""
    found = []
    for trial in with_spectra(results):
        pairs = results[trial].effective_rank.values() if trial in results else ()
        if ratios := [after / before for before, after in pairs]:
            rose = fmean(ratio > 1 for ratio in ratios)
            found.append({"task": trial.task, "method": trial.method, "rose": rose, "ratio": median(ratios)})
    return found


def _calibration(results: Results) -> list[dict[str, Any]]:
    """Return the tail's loss by the number of calibration rows, over the seeds."""
    found = []
    core = [trial for trial, _ in at_best(sweep(TASKS[0], "tail"), results)]
    trials = [*core, *calibrated(results)]
    for rows in sorted({trial.calibration_rows for trial in trials}):
        done = [results[t] for t in trials if t.calibration_rows == rows and t in results]
        if done:
            test, forgetting = (_measured(key, [getattr(o, key) for o in done]) for key in ("test", "forgetting"))
            found.append({"task": TASKS[0], "method": "tail", "calibration_rows": rows, **test, **forgetting})
    return found


def _print_more(cases: Iterable[dict[str, Any]], console: Console) -> None:
    for case in cases:
        if "rose" in case:
            text = f"effective rank rose in {case['rose']:.0%} of the layers, after / before {case['ratio']:.3f}"
        else:
            loss, forgotten = _cell(case, "test"), _cell(case, "forgetting")
            text = f"{case['calibration_rows']} calibration rows: test loss {loss}, forgetting {forgotten}"
        console.print(f"{case['task']}, {case['method']}: {text}", highlight=False)
