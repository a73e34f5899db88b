"""The suite on real models: which method gives the most accuracy for what it forgets?

SmolLM2-135M-Instruct learns tasks of `reasoning-gym`, which others have made; all-MiniLM-L6-v2, an encoder, classifies.
The learning rate of every method is searched around its own best value, as in the other suites. A method is a frontier:
the loss on its task against what it has forgotten, over the learning rates. Parts:

    core    six methods on three tasks of the chat model, one task after the other
    nlu     the same methods on a classification task of the encoder, and on one of ours
    fixed   the core at one rate for all, as in the paper
    rest    the other methods on the core's tasks, B frozen at the rank with as many trained weights, and a task of ours
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.methods import panels
from benchmarks.methods.sweep import SEEDS, Sweep, at_best, at_rate, power_of, rate, with_seeds
from benchmarks.methods.trial import Outcome, Results, Trial

TASKS = ("chain_sum", "sentence_reordering", "gsm_symbolic")
NLU = ("syllogism", "topic")  # not family_relationships: nothing is learned in 100 steps
OURS = "intent"
CORE = ("lora", "pissa", "lora_ga", "tail", "tail_frozen", "principal")
REST = ("milora", "eva", "random", "full")
RANK = 8
FIXED = -1  # the one rate of the paper's protocol: 1e-3 x 2^FIXED
# The lowest rate of a search, as a power of two around 1e-3; the best rates differ by a factor of a hundred.
FIRST = {"principal": -6, "pissa": -5, "lora_ga": -5, "tail_frozen": -1, "full": -7, "milora": -2, "eva": -3}
DEFAULT_FIRST = -2
FIRST_NLU = {"principal": -3, "pissa": -2, "lora_ga": -2, "tail_frozen": 1}


def sweep(task: str, method: str, rank: int = RANK) -> Sweep:
    """Return the search for the learning rate of a method on a task."""
    if task in NLU:
        trial = Trial("minilm", task, method, rank, 0.0, steps=100, batch_size=16, calibration_rows=64, max_length=128)
        return Sweep(trial, FIRST_NLU.get(method, 0))
    trial = Trial("smollm2", task, method, rank, 0.0, steps=40, batch_size=8, calibration_rows=64, max_length=192)
    return Sweep(trial, FIRST.get(method, DEFAULT_FIRST))


def core(results: Results) -> list[Trial]:
    """Return the trials of the table and of the frontiers."""
    return _swept(results, TASKS, CORE)


def nlu(results: Results) -> list[Trial]:
    """Return the trials of classification with the encoder."""
    return _swept(results, NLU, CORE)


def fixed(_: Results) -> list[Trial]:
    """Return the trials of the paper's protocol: every method at one rate, with every seed."""
    trials = [sweep(task, method).at(FIXED) for task in TASKS for method in CORE]
    return [replace(trial, seed=seed) for trial in trials for seed in SEEDS]


def rest(results: Results) -> list[Trial]:
    """Return the trials of the other methods, of B frozen at equal trained weights, and of our own task."""
    frozen = [trial for task in TASKS for trial in with_seeds(sweep(task, "tail_frozen", 2 * RANK), results)]
    return _swept(results, TASKS, REST) + frozen + _swept(results, [OURS], CORE)


PARTS: dict[str, Callable[[Results], list[Trial]]] = {
    "core": core,
    "nlu": nlu,
    "fixed": fixed,
    "rest": rest,
}


def missing(parts: Iterable[str], results: Results) -> list[Trial]:
    """Return the trials of `parts` that are not in `results`, each once, in the order of the parts."""
    wanted = dict.fromkeys(trial for part in parts for trial in PARTS[part](results))
    return [trial for trial in wanted if trial not in results]


def write(out: Path, results: Results, console: Console) -> None:
    """Print a table per task, and write `summary.json`, `frontier.json` and `frontier.png` into the folder `out`."""
    cases = [case for task in (*TASKS, *NLU, OURS) for case in _cases(task, results)]
    for task in (*TASKS, *NLU, OURS):
        _print(task, [case for case in cases if case["task"] == task], console)
    headline = {"runs": len(results)} | {
        f"{case['task']}.{case['method']}.{key}": case[key]
        for case in cases
        for key in ("test", "metric", "forgetting")
    }
    machines = {(env["machine"], env["device"], env["commit"]): env for env in results.environments}
    report.write(out / "summary.json", headline, cases, {"runs_on": list(machines.values())})
    panels.write("frontier", [_frontier(task, results) for task in (*TASKS, OURS)], out)
    seconds = sum(results[trial].seconds for trial in results)
    console.print(f"{len(results)} runs ({seconds / 3600:.1f} hours); tables and figures are in {out}")


def _swept(results: Results, tasks: Sequence[str], methods: Sequence[str]) -> list[Trial]:
    """Return the trials of the searches and of the seeds, one task after the other.

    Within a task the methods take turns, each from the middle of its rates: a part that was stopped has all methods.
    """
    found = []
    for task in tasks:
        searches = [sweep(task, method) for method in methods]
        turns = [sorted(with_seeds(search, results), key=partial(_distance_from_middle, search)) for search in searches]
        found += [trial for turn in zip_longest(*turns) for trial in turn if trial]
    return found


def _distance_from_middle(search: Sweep, trial: Trial) -> tuple[int, int]:
    return trial.seed, abs(power_of(trial.learning_rate) - search.first - 2)


def _cases(task: str, results: Results) -> list[dict[str, Any]]:
    """Return the finished methods of a task, the lowest loss first, each with the mean and spread over its seeds."""
    searches = {method: sweep(task, method) for method in (*CORE, *REST)}
    searches["tail_frozen, equal weights"] = sweep(task, "tail_frozen", 2 * RANK)
    found = []
    for method, search in searches.items():
        best = at_best(search, results)
        outcomes = [outcome for _, outcome in best if math.isfinite(outcome.test)]
        if len(best) < len(SEEDS) or not outcomes:
            continue
        at_fixed = at_rate(search.at(FIXED), results)
        found.append(
            {
                "task": task,
                "method": method,
                "rate": best[0][0].learning_rate,
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
    columns = ("best rate", "test loss", "right answers", "forgetting", f"loss at {rate(FIXED):g}", "forgetting")
    table = Table("method", *columns, title=f"{task}: means of {len(SEEDS)} seeds, losses in nats")
    for case in cases:
        keys = ("test", "metric", "forgetting", "fixed", "fixed_forgetting")
        table.add_row(case["method"], f"{case['rate']:g}", *(_cell(case, key) for key in keys))
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
