"""The paper's figures, and three more: learning-rate searches, forgetting, and experimental initialisations."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.methods import starts
from benchmarks.methods import suite as parts
from benchmarks.methods.panels import Panel
from benchmarks.methods.suite import Suite, at_rank
from benchmarks.methods.sweep import Sweep, at_best, at_rate, rate
from benchmarks.methods.trial import Outcome, Results
from trainer.layer_kinds import kinds_of

Points = Sequence[tuple[float, float]]
_BESIDE_TRIED = ("lora", "eva", "lora_ga", "tail", "full")
_STEP, _LOSS = "step", "training loss, nats per target token"


def all_figures(suite: Suite, results: Results) -> dict[str, list[Panel]]:
    """Return the panels of every figure by its name."""
    return {
        "figure1": _figure1(suite, results),
        "figure2": _figure2(suite, results),
        "figure3": _figure3(suite, results),
        "figure4": _curves(suite, results, parts.TASKS, parts.SUBSPACES),
        "figure5": _curves(suite, results, parts.FAMILIES, parts.FEW),
        "rates": [*(_rates(suite, results, task, parts.CORE) for task in parts.TASKS), _scalings(suite, results)],
        "forgetting": [_forgetting(suite, results, task, starts.METHODS) for task in parts.TASKS],
        "tried": [_forgetting(suite, results, task, [*_BESIDE_TRIED, *starts.TRIED]) for task in parts.TASKS],
    }


def _figure1(suite: Suite, results: Results) -> list[Panel]:
    sweeps: dict[str, Sweep | None] = {
        f"tail r = {rank}": at_rank(suite, results, rank, "tail", parts.CODE) for rank in suite.ranks
    }
    largest = suite.ranks[-1]
    sweeps[f"lora r = {largest}"] = at_rank(suite, results, largest, "lora", parts.CODE)
    sweeps["full"] = suite.sweep(parts.CODE, "full")
    panels = []
    for key, ylabel in (("curve", _LOSS), ("gradients", "gradient norm before clipping")):
        lines = {
            name: _mean_curve([o for _, o in at_best(sweep, results)], key) for name, sweep in sweeps.items() if sweep
        }
        panels.append(Panel(f"{parts.CODE}: each at its best learning rate", _STEP, ylabel, lines, "y"))
    return panels


def _figure2(suite: Suite, results: Results) -> list[Panel]:
    def over_ranks(value: Callable[[Outcome], float]) -> dict[str, Points]:
        lines: dict[str, Points] = {}
        for method in parts.OVER_RANKS:
            sweeps = {rank: at_rank(suite, results, rank, method, parts.ANSWERS) for rank in suite.ranks[:-1]}
            lines[method] = [
                (rank, fmean(value(o) for _, o in found))
                for rank, sweep in sweeps.items()
                if sweep and (found := at_best(sweep, results))
            ]
        return lines

    def over(setting: str, values: Sequence[Any]) -> dict[str, list[tuple[Any, float]]]:
        """Return by method the loss for each of `values` of one setting of the calibration."""
        lines = {}
        for method in parts.CALIBRATED:
            best = [trial for trial, _ in at_best(suite.sweep(parts.CODE, method), results)]
            runs = [(value, [results.get(replace(trial, **{setting: value})) for trial in best]) for value in values]
            lines[method] = [(value, fmean(o.test for o in found if o)) for value, found in runs if any(found)]
        return lines

    loss, texts = "test loss", ("own", "other", "random")
    answers, code = parts.ANSWERS, parts.CODE
    right = over_ranks(lambda outcome: outcome.metric or 0)
    return [
        Panel(f"{answers}: test loss by rank", "rank", loss, over_ranks(lambda o: o.test), "xy", "points"),
        Panel(f"{answers}: share of exact answers by rank", "rank", "share", right, "x", "points"),
        Panel(f"{code}: text for calibration", "", loss, over("calibration", texts), style="words"),
        Panel(f"{code}: rows for calibration", "rows", loss, over("calibration_rows", parts.SIZES), "x", "points"),
    ]


def _figure3(suite: Suite, results: Results) -> list[Panel]:
    blocks: dict[str, Points] = {}
    kinds: dict[str, list[tuple[str, float]]] = {}
    for method in parts.MEASURED:
        for trial, _ in at_best(suite.sweep(parts.CODE, method), results, (0,)):
            measured = replace(trial, spectra=True)
            if measured not in results:
                continue
            ranks = results[measured].effective_rank
            kind_of = kinds_of(list(ranks))
            for label, index in (("before", 0), (method, 1)):
                values = {name: pair[index] for name, pair in ranks.items()}
                blocks[label] = _means((_block(name), value) for name, value in values.items())
                kinds[label] = _means((kind_of[name], value) for name, value in values.items())
    title = f"{parts.CODE}: effective rank of the outputs"
    return [
        Panel(f"{title} by block", "block", "mean over a block's layers", blocks, style="points"),
        Panel(f"{title} by layer", "", "mean over the blocks", kinds, style="words"),
    ]


def _curves(suite: Suite, results: Results, tasks: Iterable[str], methods: Iterable[str]) -> list[Panel]:
    panels = []
    for task in tasks:
        sweeps = {method: suite.sweep(task, method) for method in methods}
        best = {m: _mean_curve([o for _, o in at_best(s, results)], "curve") for m, s in sweeps.items()}
        fixed = {m: _mean_curve(at_rate(s.at(parts.FIXED), results), "curve") for m, s in sweeps.items()}
        panels.append(Panel(f"{task}: each at its best learning rate", _STEP, _LOSS, best, "y"))
        panels.append(Panel(f"{task}: all at the learning rate {rate(parts.FIXED):g}", _STEP, _LOSS, fixed, "y"))
    return panels


def _rates(suite: Suite, results: Results, task: str, methods: Iterable[str]) -> Panel:
    sweeps = {method: suite.sweep(task, method) for method in methods}
    return _searches(f"{task}: search for the learning rate", sweeps, results)


def _scalings(suite: Suite, results: Results) -> Panel:
    sweeps = {f"alpha = {value:g} rank": parts.at_scaling(suite, value) for value in parts.SCALINGS}
    return _searches(f"{parts.CODE}, tail: search with other scalings", sweeps, results)


def _searches(title: str, sweeps: Mapping[str, Sweep], results: Results) -> Panel:
    lines = {}
    for name, sweep in sweeps.items():
        trials = [trial for trial in sweep.trials(results) if trial in results]
        lines[name] = [(t.learning_rate, v) for t in trials if math.isfinite(v := results[t].validation)]
    highest = 1.4 * min((loss for points in lines.values() for _, loss in points), default=1.0)
    return Panel(title, "learning rate", "validation loss", lines, "xy", "points", highest)


def _forgetting(suite: Suite, results: Results, task: str, methods: Iterable[str]) -> Panel:
    """Return task loss against forgetting: a path over the learning rates per method, and its best rate as a point."""
    lines = {}
    for method in methods:
        sweep = suite.sweep(task, method)
        best = [outcome for _, outcome in at_best(sweep, results) if math.isfinite(outcome.test)]
        if best:
            path = [results[trial] for trial in sweep.trials(results)]
            points = [(o.forgetting, o.test) for o in path if math.isfinite(o.test)]
            lines[method] = [*points, (fmean(o.forgetting for o in best), fmean(o.test for o in best))]
    label = "forgetting: loss on the base's own text, after - before"
    return Panel(f"{task}: test loss and forgetting", label, "test loss", lines, style="path")


def _mean_curve(outcomes: Sequence[Outcome], key: str, window: int = 5) -> Points:
    """Return the mean of the field `key` over seeds and over `window` steps."""
    series = [values for outcome in outcomes if (values := getattr(outcome, key))]
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
