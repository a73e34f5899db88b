"""The comparison of methods: its data, its searches and its files; the comparison itself takes hours."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.methods import run, starts, summary, tasks
from benchmarks.methods.starts import Moments
from benchmarks.methods.suite import CORE, PARTS, SUITES, missing
from benchmarks.methods.sweep import SEEDS, Sweep, at_best, rate, with_seeds
from benchmarks.methods.trial import Outcome, Results, Trial
from trainer import evaluate

SMALL = SUITES["small"]
TRIAL = Trial("embedded", "math", "tail", 4, 4e-3, 2, 2)
ENV = {"machine": "none", "device": "cpu", "commit": "none"}


def results_of(tmp_path: Path, loss: Callable[[Trial], float], trials: list[Trial]) -> Results:
    """The given trials as if they had been run."""
    results = Results(tmp_path / "runs")
    for trial in trials:
        results.add(trial, outcome(loss(trial)), ENV)
    return results


def outcome(loss: float) -> Outcome:
    if math.isinf(loss):
        return Outcome(error="the loss became nan")
    ranks = {f"layers.{i}.{kind}": (2.0, 3.0) for i in range(2) for kind in ("q_proj", "k_proj")}
    return Outcome(loss, loss, 0.5, 0.1, [4.0, loss] * 5, [1.0] * 10, ranks, 10, 1.0)


def run_all(tmp_path: Path, loss: Callable[[Trial], float], parts: list[str]) -> Results:
    """Every trial that the parts ask for, as if it had been run."""
    results = Results(tmp_path / "runs")
    while todo := missing(parts, SMALL, results):
        for trial in todo:
            results.add(trial, outcome(loss(trial)), ENV)
    return results


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and bases that a test makes are its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("task", set(tasks.TASKS) - {"random"})
def test_rows_are_distinct_repeatable_and_of_one_split_only(task: str) -> None:
    splits = [tasks.rows(task, split, n) for split, n in (("train", 500), ("validation", 50), ("test", 50))]
    texts = [[row.get("text") or str(row.get("prompt") or row["messages"][0]) for row in found] for found in splits]
    assert [len(set(found)) for found in texts] == [500, 50, 50]
    shared = 600 - len(set().union(*texts))
    assert shared <= (6 if task in ("cpp", "python") else 0)  # files have a little boilerplate in common
    assert splits[0] == tasks.rows(task, "train", 500)


def test_every_windows_file_belongs_to_one_split() -> None:
    chosen = [{path for path in tasks.headers() if tasks._split(path) == s} for s in ("train", "validation", "test")]
    assert all(len(found) > 50 for found in chosen)
    assert sum(map(len, chosen)) == len(tasks.headers())


def test_worked_arithmetic_is_right() -> None:
    for row in tasks.rows("math", "train", 500):
        *steps, answer = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)|Answer: (\d+)", row["completion"])
        for a, sign, b, result, _ in steps:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)
        assert answer[-1] == steps[-1][3]


def test_a_trials_name_is_a_file_name() -> None:
    for method in (*starts.METHODS, *starts.TRIED):
        assert re.fullmatch(r"[\w.+-]+", replace(TRIAL, method=method).name)


def test_a_trials_name_changes_with_every_number_that_its_result_depends_on() -> None:
    changed = {"calibration": "random", "spectra": True}
    for field in fields(Trial):
        value = getattr(TRIAL, field.name)
        other = changed.get(field.name) or (f"{value}2" if isinstance(value, str) else value * 2 + 1)
        assert replace(TRIAL, **{field.name: other}).name != TRIAL.name


def test_runs_come_back_from_disk_diverged_ones_too_and_half_written_ones_do_not(tmp_path: Path) -> None:
    fine, diverged = TRIAL, replace(TRIAL, seed=1)
    results_of(tmp_path, lambda trial: math.inf if trial.seed else 1.5, [fine, diverged])
    whole = (tmp_path / "runs" / f"{fine.name}.json").read_text()
    (tmp_path / "runs" / f"{replace(TRIAL, seed=2).name}.partial").write_text(whole[:50])
    again = Results(tmp_path / "runs")
    assert len(again) == 2
    assert again[fine] == outcome(1.5)
    assert again[diverged] == outcome(math.inf)
    assert "Infinity" not in (tmp_path / "runs" / f"{diverged.name}.json").read_text()


@pytest.mark.parametrize("best", [-4, 0, 2, 5])
def test_a_search_widens_until_its_best_rate_is_inside(tmp_path: Path, best: int) -> None:
    sweep = Sweep(TRIAL, first=0)
    results = Results(tmp_path)
    while todo := [trial for trial in sweep.trials(results) if trial not in results]:
        for trial in todo:
            results.add(trial, outcome(1 + abs(math.log2(trial.learning_rate / rate(best)))), ENV)
    chosen = sweep.best(results)
    assert chosen == sweep.at(best)
    assert {sweep.at(best - 1), sweep.at(best + 1)} < set(sweep.trials(results))
    assert len(sweep.trials(results)) >= 5


def test_a_search_takes_a_rate_that_did_not_diverge_and_asks_for_seeds_only_at_its_end(tmp_path: Path) -> None:
    sweep = Sweep(TRIAL, first=0)
    results = Results(tmp_path)
    assert sweep.best(results) is None
    assert with_seeds(sweep, results) == sweep.trials(results)
    for trial in [sweep.at(power) for power in range(-2, 5)]:
        results.add(trial, outcome(math.inf if trial.learning_rate > rate(-1) else 1 - trial.learning_rate), ENV)
    assert sweep.best(results) == sweep.at(-1)
    assert [t.seed for t in with_seeds(sweep, results) if t.learning_rate == rate(-1)] == [0, *SEEDS]
    assert len(at_best(sweep, results)) == 1


def test_every_part_ends_and_everything_is_drawn_from_the_files_without_a_run(tmp_path: Path) -> None:
    def loss(trial: Trial) -> float:
        return 1 + abs(math.log2(trial.learning_rate / (1e-3 if trial.method == "full" else 4e-3)))

    results = run_all(tmp_path, loss, list(PARTS))
    assert missing(PARTS, SMALL, results) == []
    for method in CORE:
        assert len(at_best(SMALL.sweep("math", method), results)) == 3
    summary.write(tmp_path, SMALL, Results(tmp_path / "runs"), Console(quiet=True))
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["summary"]["embedded.math.tail.test"] == 1
    figures = {f"figure{n}" for n in range(1, 6)} | {"rates", "forgetting", "tried"}
    assert {file.stem for file in tmp_path.glob("*.png")} == {file.stem for file in tmp_path.glob("*.json")} - {
        "summary"
    }
    assert figures == {file.stem for file in tmp_path.glob("*.png")}


@pytest.mark.parametrize("method", ["tail", "full", "contrast"])
def test_a_trial_runs_and_repeats(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROWS", {"train": 16, "validation": 4, "test": 4})
    monkeypatch.setattr(evaluate, "_LENGTH", 16)  # of the base's own text
    monkeypatch.setattr(run, "_rows", lambda task, split: tasks.rows(task, split, run.ROWS[split]))
    trial = replace(TRIAL, method=method, calibration_rows=8)
    first, _ = run.execute(trial)
    if method == "tail":
        again, _ = run.execute(trial)
        assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.error is None
    assert len(first.curve) == 2
    assert math.isfinite(first.validation + first.test + first.forgetting)


@pytest.mark.parametrize("name", starts.TRIED)
def test_tried_starts_are_finite_and_have_their_shapes(name: str) -> None:
    torch.manual_seed(0)
    weight, x, own, g = (torch.randn(n, d, dtype=torch.float64) for n, d in ((12, 8), (50, 8), (50, 8), (50, 12)))
    y = x @ weight.T
    moments = Moments(weight, x.T @ x / 50, y.T @ y / 50, g.T @ g, lambda: own.T @ own / 50)
    start = starts.TRIED[name](moments, 4)
    assert start.a0.shape == (4, 8)
    assert start.b0.shape == (12, 4)
    assert start.a0.isfinite().all()
    assert start.b0.isfinite().all()


def test_contrast_sees_the_task_and_not_the_bases_own_text() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    task, own = basis[:, :6], basis[:, 3:]  # three directions belong to the task alone
    weight = torch.randn(4, 8, dtype=torch.float64)
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    start = starts.contrast(Moments(weight, task @ task.T, nothing, nothing, lambda: own @ own.T), 3)
    assert (start.a0 @ basis[:, 3:]).abs().max() < 0.02
    assert torch.linalg.matrix_rank(start.a0 @ basis[:, :3]) == 3
