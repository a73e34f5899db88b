"""The paper's figures, and three that it lacks: searches of the learning rate, and task loss against forgetting."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.methods import starts
from benchmarks.methods.panels import Panel
from benchmarks.methods.suite import ANSWERS, CODE, CORE, FAMILIES, FEW, FIXED, SIZES, SUBSPACES, TASKS, Suite, around
from benchmarks.methods.sweep import Sweep, at_best, rate
from benchmarks.methods.trial import Outcome, Results
from trainer.analysis.measures import kinds_of

Points = Sequence[tuple[float, float]]
_BESIDE_TRIED = ("lora", "eva", "lora_ga", "tail", "full")
_STEP, _LOSS = "step", "training loss, nats per target token"


def all_figures(suite: Suite, results: Results) -> dict[str, list[Panel]]:
    """Return the panels of every figure by its name."""
    return {
        "figure1": _figure1(suite, results),
        "figure2": _figure2(suite, results),
        "figure3": _figure3(suite, results),
        "figure4": _curves(suite, results, TASKS, SUBSPACES),
        "figure5": _curves(suite, results, FAMILIES, FEW),
        "rates": [_rates(suite, results, task, CORE) for task in TASKS],
        "forgetting": [_forgetting(suite, results, task, starts.METHODS) for task in TASKS],
        "tried": [_forgetting(suite, results, task, [*_BESIDE_TRIED, *starts.TRIED]) for task in TASKS],
    }


def _figure1(suite: Suite, results: Results) -> list[Panel]:
    sweeps: dict[str, Sweep | None] = {
        f"tail r = {rank}": around(suite, results, rank, "tail", CODE) for rank in suite.ranks
    }
    most = suite.ranks[-1]
    sweeps[f"lora r = {most}"] = around(suite, results, most, "lora", CODE)
    sweeps["full"] = suite.sweep(CODE, "full")
    panels = []
    for what, ylabel in (("curve", _LOSS), ("gradients", "gradient norm before clipping")):
        lines = {
            name: _mean_curve([o for _, o in at_best(sweep, results)], what) for name, sweep in sweeps.items() if sweep
        }
        panels.append(Panel(f"{CODE}: each at its best learning rate", _STEP, ylabel, lines, "y"))
    return panels


def _figure2(suite: Suite, results: Results) -> list[Panel]:
    methods = ("lora", "pissa", "tail", "principal")

    def over_ranks(value: Callable[[Outcome], float]) -> dict[str, Points]:
        lines: dict[str, Points] = {}
        for method in methods:
            sweeps = {rank: around(suite, results, rank, method, ANSWERS) for rank in suite.ranks}
            lines[method] = [
                (rank, fmean(value(o) for _, o in found))
                for rank, sweep in sweeps.items()
                if sweep and (found := at_best(sweep, results))
            ]
        return lines

    texts: dict[str, list[tuple[str, float]]] = {}
    sizes: dict[str, list[tuple[float, float]]] = {}
    for method in ("tail", "principal"):
        found = [trial for trial, _ in at_best(suite.sweep(CODE, method), results)]
        texts[method] = [
            (text, fmean(results[t].test for t in runs))
            for text in ("own", "other", "random")
            if (runs := [t for trial in found if (t := replace(trial, calibration=text)) in results])
        ]
        sizes[method] = [
            (n, fmean(results[t].test for t in runs))
            for n in SIZES
            if (runs := [t for trial in found if (t := replace(trial, calibration_rows=n)) in results])
        ]
    loss = "test loss"
    return [
        Panel(f"{ANSWERS}: final loss over rank", "rank", loss, over_ranks(lambda o: o.test), "xy", "points"),
        Panel(
            f"{ANSWERS}: exact answers over rank", "rank", "share", over_ranks(lambda o: o.metric or 0), "x", "points"
        ),
        Panel(f"{CODE}: whose text calibrates", "", loss, texts, style="bars"),
        Panel(f"{CODE}: how many rows calibrate", "rows", loss, sizes, "x", "points"),
    ]


def _figure3(suite: Suite, results: Results) -> list[Panel]:
    blocks: dict[str, Points] = {}
    kinds: dict[str, list[tuple[str, float]]] = {}
    for method in ("lora", "tail", "principal", "full"):
        for trial, _ in at_best(suite.sweep(CODE, method), results, (0,)):
            measured = replace(trial, spectra=True)
            if measured not in results:
                continue
            ranks = results[measured].effective_rank
            kind_of = kinds_of(list(ranks))
            for when, place in (("before", 0), (method, 1)):
                values = {name: pair[place] for name, pair in ranks.items()}
                blocks[when] = _means((_block(name), value) for name, value in values.items())
                kinds[when] = _means((kind_of[name], value) for name, value in values.items())
    title = f"{CODE}: effective rank of the outputs"
    return [
        Panel(f"{title} by block", "block", "mean over a block's layers", blocks, style="points"),
        Panel(f"{title} by layer", "", "mean over the blocks", kinds, style="bars"),
    ]


def _curves(suite: Suite, results: Results, tasks: Iterable[str], methods: Iterable[str]) -> list[Panel]:
    panels = []
    for task in tasks:
        sweeps = {method: suite.sweep(task, method) for method in methods}
        best = {m: _mean_curve([o for _, o in at_best(s, results)], "curve") for m, s in sweeps.items()}
        fixed = {m: _mean_curve([results[t]], "curve") for m, s in sweeps.items() if (t := s.at(FIXED)) in results}
        panels.append(Panel(f"{task}: each at its best learning rate", _STEP, _LOSS, best, "y"))
        panels.append(Panel(f"{task}: all at {rate(FIXED):g}", _STEP, _LOSS, fixed, "y"))
    return panels


def _rates(suite: Suite, results: Results, task: str, methods: Iterable[str]) -> Panel:
    lines = {}
    for method in methods:
        trials = [trial for trial in suite.sweep(task, method).trials(results) if trial in results]
        lines[method] = [(t.learning_rate, v) for t in trials if math.isfinite(v := results[t].validation)]
    highest = 1.4 * min((loss for points in lines.values() for _, loss in points), default=1.0)
    title = f"{task}: the search for a learning rate"
    return Panel(title, "learning rate", "validation loss", lines, "xy", "points", highest)


def _forgetting(suite: Suite, results: Results, task: str, methods: Iterable[str]) -> Panel:
    """Each method's way over the learning rates, and its best one as a point."""
    lines = {}
    for method in methods:
        sweep = suite.sweep(task, method)
        best = [outcome for _, outcome in at_best(sweep, results)]
        if best:
            way = [results[trial] for trial in sweep.trials(results)]
            points = [(o.forgetting, o.test) for o in way if math.isfinite(o.test)]
            lines[method] = [*points, (fmean(o.forgetting for o in best), fmean(o.test for o in best))]
    label = "forgetting: loss on the base's own text, after - before"
    return Panel(f"{task}: what it costs", label, "test loss", lines, style="path")


def _mean_curve(outcomes: Sequence[Outcome], what: str, window: int = 5) -> Points:
    """Return the mean over seeds and over `window` steps."""
    series = [values for outcome in outcomes if (values := getattr(outcome, what))]
    if not series:
        return []
    length = min(len(values) for values in series)
    means = [fmean(values[i] for values in series) for i in range(length)]
    return [(i + window / 2, fmean(means[i : i + window])) for i in range(0, length - window + 1, window)]


def _means(pairs: Iterable[tuple[Any, float]]) -> list[tuple[Any, float]]:
    groups: dict[Any, list[float]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return [(key, fmean(values)) for key, values in groups.items()]


def _block(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())
