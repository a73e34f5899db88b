"""The comparison of methods: data, searches, files and tables; the comparison itself takes hours."""

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.methods import real, real_tables, run, starts, summary, tasks
from benchmarks.methods.starts import Moments
from benchmarks.methods.suite import CORE, PARTS, SUITES, missing
from benchmarks.methods.sweep import SEEDS, Sweep, at_best, rate, with_seeds
from benchmarks.methods.trial import Outcome, Results, Trial
from trainer import evaluate

SMALL = SUITES["small"]
TRIAL = Trial("embedded", "math", "tail", 4, 4e-3, 2, 2)
ENV = {"machine": "none", "device": "cpu", "commit": "none"}


def results_of(tmp_path: Path, loss: Callable[[Trial], float], trials: list[Trial]) -> Results:
    """Return results with a run of each of `trials`, whose validation loss is `loss`."""
    results = Results(tmp_path / "runs.jsonl")
    for trial in trials:
        results.add(trial, outcome(loss(trial)), ENV)
    return results


def outcome(loss: float) -> Outcome:
    """Return an outcome with the validation loss `loss` and a test loss that is 1 % lower."""
    if math.isinf(loss):
        return Outcome(error="the loss became nan")
    ranks = {f"layers.{i}.{kind}": (2.0, 3.0) for i in range(2) for kind in ("q_proj", "k_proj")}
    return Outcome(loss, float(f"{0.99 * loss:.6g}"), 0.5, 0.1, [4.0, loss] * 5, [1.0] * 10, ranks, 10, 1.0)


def run_all(tmp_path: Path, loss: Callable[[Trial], float], parts: list[str]) -> Results:
    """Return results with a run of every trial of `parts`, whose validation loss is `loss`."""
    results = Results(tmp_path / "runs.jsonl")
    while todo := missing(parts, SMALL, results):
        for trial in todo:
            results.add(trial, outcome(loss(trial)), ENV)
    return results


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a new cache folder for texts and bases."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# The public tasks need a package that is not installed for the tests.
@pytest.mark.parametrize("task", sorted(set(tasks.TASKS) - {"random", *tasks.PUBLIC}))
def test_rows_are_distinct_repeatable_and_in_one_split(task: str) -> None:
    splits = [tasks.rows(task, split, n) for split, n in (("train", 500), ("validation", 50), ("test", 50))]
    texts = [[row.get("text") or str(row.get("prompt") or row["messages"][0]) for row in found] for found in splits]
    assert [len(set(found)) for found in texts] == [500, 50, 50]
    shared = 600 - len(set().union(*texts))
    assert shared <= (6 if task in ("cpp", "python") else 0)  # some files share boilerplate
    assert splits[0] == tasks.rows(task, "train", 500)


def test_windows_of_a_split_are_from_files_of_that_split() -> None:
    sources = {f"file{i}.h": f"{i:03d} " * 100 for i in range(60)}
    seen = {}
    for split in ("train", "validation", "test"):
        found = islice(tasks.windows(random.Random(0), sources, split, 80), 400)
        seen[split] = {re.findall(r"\d{3}", text)[0] for text in found}
    assert all(seen.values())
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))


def test_the_arithmetic_of_the_answers_is_right() -> None:
    for row in tasks.rows("math", "train", 500):
        *steps, answer = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)|Answer: (\d+)", row["completion"])
        for a, sign, b, result, _ in steps:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)
        assert answer[-1] == steps[-1][3]


def test_a_trial_name_has_only_plain_characters() -> None:
    for method in (*starts.METHODS, *starts.TRIED):
        assert re.fullmatch(r"[\w.+-]+", replace(TRIAL, method=method).name)


def test_a_trial_name_depends_on_every_setting() -> None:
    changed = {"calibration": "random", "spectra": True}
    for field in fields(Trial):
        value = getattr(TRIAL, field.name)
        other = changed.get(field.name) or (f"{value}2" if isinstance(value, str) else value * 2 + 1)
        assert replace(TRIAL, **{field.name: other}).name != TRIAL.name


def test_runs_are_read_back_from_disk(tmp_path: Path) -> None:
    finished, diverged = TRIAL, replace(TRIAL, seed=1)
    results_of(tmp_path, lambda trial: math.inf if trial.seed else 1.5, [finished, diverged])
    again = Results(tmp_path / "runs.jsonl")
    assert len(again) == 2
    assert again[finished] == outcome(1.5)
    assert again[diverged] == outcome(math.inf)
    assert "Infinity" not in (tmp_path / "runs.jsonl").read_text()


def test_numbers_that_are_not_finite_become_infinite_in_memory_and_on_disk(tmp_path: Path) -> None:
    results = Results(tmp_path / "runs.jsonl")
    broken = replace(outcome(1.5), validation=math.nan, gradients=[1.0, math.inf, math.nan])
    results.add(TRIAL, broken, ENV)
    assert results[TRIAL] == Results(tmp_path / "runs.jsonl")[TRIAL]
    assert results[TRIAL].validation == math.inf
    assert results[TRIAL].gradients == [1.0, math.inf, math.inf]


@pytest.mark.parametrize("length", [1, 20, -2])
def test_an_incomplete_last_line_is_counted_and_no_other_run_is_lost(tmp_path: Path, length: int) -> None:
    file = tmp_path / "runs.jsonl"
    first, second, third = (replace(TRIAL, seed=seed) for seed in range(3))
    results_of(tmp_path, lambda _: 1.5, [first, second])
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:length])  # as after a kill during the write
    torn = Results(file)
    assert (list(torn), torn.torn) == ([first], 1)
    torn.add(third, outcome(2.5), ENV)
    torn.add(second, outcome(1.5), ENV)
    again = Results(file)
    assert (list(again), again.torn) == ([first, third, second], 1)
    assert [again[trial].validation for trial in again] == [1.5, 2.5, 1.5]


def test_a_last_line_without_its_newline_is_a_complete_run(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    results_of(tmp_path, lambda _: 1.5, [TRIAL])
    file.write_bytes(file.read_bytes().removesuffix(b"\n"))
    Results(file).add(replace(TRIAL, seed=1), outcome(1.5), ENV)
    again = Results(file)
    assert (len(again), again.torn) == (2, 0)


def test_the_last_of_two_runs_of_a_trial_counts(tmp_path: Path) -> None:
    for loss in (1.5, 2.5):
        results_of(tmp_path, lambda _, loss=loss: loss, [TRIAL])
    again = Results(tmp_path / "runs.jsonl")
    assert (len(again), len(again.environments), again[TRIAL].validation) == (1, 1, 2.5)


APPEND = """
import sys
from pathlib import Path
from benchmarks.methods.trial import Outcome, Results, Trial
results = Results(Path(sys.argv[1]))
for seed in range(int(sys.argv[2]), int(sys.argv[3])):
    results.add(Trial("embedded", "math", "tail", 4, 4e-3, 2, 2, seed), Outcome(curve=[float(seed)] * 3000), {})
    print(seed, flush=True)
"""


def appending(file: Path, first: int, end: int) -> subprocess.Popen[str]:
    """Start a process that appends the runs of seeds `first` to `end` - 1 and prints each seed after its run."""
    command = [sys.executable, "-c", APPEND, str(file), str(first), str(end)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_no_run_is_lost_when_several_processes_append_and_one_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    with appending(file, 0, 100) as finished, appending(file, 1000, 10**6) as killed:
        assert killed.stdout is not None
        printed = [int(next(killed.stdout)) for _ in range(50)]
        killed.kill()
        printed += [int(line) for line in killed.stdout]
        assert finished.wait(120) == 0
    found = Results(file)
    seeds = {trial.seed for trial in found}
    assert {*range(100), *printed} <= seeds
    assert len(seeds) <= 100 + len(printed) + 1  # one may be appended but not printed
    assert found.torn <= 1
    assert all(found[trial].curve == [float(trial.seed)] * 3000 for trial in found)


def test_runs_of_another_protocol_are_ignored_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results_of(tmp_path, lambda _: 1.5, [TRIAL])
    name = TRIAL.name
    monkeypatch.setattr("benchmarks.methods.trial.PROTOCOL", 2)
    again = Results(tmp_path / "runs.jsonl")
    assert (len(again), again.ignored) == (0, [name])


@pytest.mark.parametrize("best", [-4, 0, 2, 5])
def test_a_search_widens_until_its_best_rate_is_not_at_the_edge(tmp_path: Path, best: int) -> None:
    sweep = Sweep(TRIAL, first=0)
    results = Results(tmp_path / "runs.jsonl")
    while todo := [trial for trial in sweep.trials(results) if trial not in results]:
        for trial in todo:
            results.add(trial, outcome(1 + abs(math.log2(trial.learning_rate / rate(best)))), ENV)
    chosen = sweep.best(results)
    assert chosen == sweep.at(best)
    assert {sweep.at(best - 1), sweep.at(best + 1)} < set(sweep.trials(results))
    assert len(sweep.trials(results)) >= 5


def test_a_finished_search_has_the_best_rate_that_did_not_diverge_with_all_seeds(tmp_path: Path) -> None:
    sweep = Sweep(TRIAL, first=0)
    results = Results(tmp_path / "runs.jsonl")
    assert sweep.best(results) is None
    assert with_seeds(sweep, results) == sweep.trials(results)
    for trial in [sweep.at(power) for power in range(-2, 5)]:
        results.add(trial, outcome(math.inf if trial.learning_rate > rate(-1) else 1 - trial.learning_rate), ENV)
    assert sweep.best(results) == sweep.at(-1)
    assert [t.seed for t in with_seeds(sweep, results) if t.learning_rate == rate(-1)] == [0, *SEEDS]
    assert len(at_best(sweep, results)) == 1


def test_every_part_ends_and_all_tables_and_figures_are_made_from_the_file(tmp_path: Path) -> None:
    def loss(trial: Trial) -> float:
        return 1 + abs(math.log2(trial.learning_rate / (1e-3 if trial.method == "full" else 4e-3)))

    results = run_all(tmp_path, loss, list(PARTS))
    assert missing(PARTS, SMALL, results) == []
    for method in CORE:
        assert len(at_best(SMALL.sweep("math", method), results)) == 3
    summary.write(tmp_path, SMALL, Results(tmp_path / "runs.jsonl"), Console(quiet=True))
    figures = {f"figure{n}" for n in range(1, 6)} | {"rates", "forgetting", "tried"}
    assert {file.stem for file in tmp_path.glob("*.json")} == figures | {"summary"}
    assert {file.stem for file in tmp_path.glob("*.png")} == figures


def test_the_suite_real_ends_and_its_table_has_every_method_at_its_own_rate(tmp_path: Path) -> None:
    def loss(trial: Trial) -> float:
        best = 3e-5 if trial.method == "principal" else 5e-4
        return 1 + abs(math.log2(trial.learning_rate / best))

    results = Results(tmp_path / "runs.jsonl")
    while todo := real.missing(real.PARTS, results):
        for trial in todo:
            results.add(trial, outcome(loss(trial)), ENV)
    real_tables.write(tmp_path, results, Console(quiet=True))
    cases = json.loads((tmp_path / "summary.json").read_text())["cases"]
    found = {case["method"]: case["rate"] for case in cases if case["task"] == "chain_sum" and "rate" in case}
    assert {*real.CORE, *real.REST, "tail_frozen, equal weights"} == {*found}
    assert (found["principal"], found["lora"]) == (rate(-5), rate(-1))
    assert [case["calibration_rows"] for case in cases if "calibration_rows" in case] == [4, 16, 64, 256, 1024]
    assert (tmp_path / "frontier.png").exists()


def test_the_table_compares_methods_seed_by_seed_at_their_best_rates(tmp_path: Path) -> None:
    def loss(trial: Trial) -> float:
        distance = abs(math.log2(trial.learning_rate / (2e-3 if trial.method == "lora" else 4e-3)))
        if trial.method == "eva" and trial.seed == 2:
            return math.inf
        return (0.9 if trial.method == "tail" else 1.0) * (1 + distance) * (10 + trial.seed)

    run_all(tmp_path, loss, ["core", "fixed_rate"])
    summary.write(tmp_path, SMALL, Results(tmp_path / "runs.jsonl"), Console(quiet=True))
    cases = json.loads((tmp_path / "summary.json").read_text())["cases"]
    tail, eva = (next(c for c in cases if (c["task"], c["method"]) == ("math", name)) for name in ("tail", "eva"))
    assert (tail["rate"], tail["diverged"]) == (4e-3, 0)
    assert tail["test"] == pytest.approx(0.99 * 0.9 * 11)
    assert tail["test_spread"] == pytest.approx(0.99 * 0.9)  # of 10, 11 and 12
    assert tail["against_lora"] == pytest.approx(-0.1)
    assert tail["against_lora_spread"] == pytest.approx(0, abs=1e-9)
    assert tail["fixed_against_lora"] == pytest.approx(
        0.9 * 3 / 2 - 1
    )  # 1e-3 is two steps from its best, one from LoRA's
    assert (eva["diverged"], eva["test"]) == (1, pytest.approx(0.99 * 10.5))


def test_in_the_shipped_results_the_first_loss_depends_on_the_seed_and_not_on_the_method() -> None:
    results = Results(Path(summary.__file__).parents[1] / "results" / "methods" / "small" / "runs.jsonl")
    first: dict[tuple[str, str, int], dict[int, set[float]]] = {}
    for trial in results:
        if trial.method != "full":  # in float32
            seeds = first.setdefault((trial.base, trial.task, trial.batch_size), {})
            seeds.setdefault(trial.seed, set()).add(results[trial].curve[0])
    assert len(first) >= 4
    for seeds in first.values():
        assert all(len(losses) == 1 for losses in seeds.values())
        assert len(set.union(*seeds.values())) == len(seeds)


@pytest.mark.parametrize("method", ["tail", "full", "contrast"])
def test_a_trial_runs_and_is_repeatable(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ROWS", {"train": 16, "validation": 4, "test": 4})
    monkeypatch.setattr(evaluate, "_LENGTH", 16)  # of the base's own text
    monkeypatch.setattr(run, "_rows", lambda task, split, n: tasks.rows(task, split, n))
    trial = replace(TRIAL, method=method, calibration_rows=8)
    first, _ = run.execute(trial)
    if method == "tail":
        again, _ = run.execute(trial)
        assert replace(first, seconds=0) == replace(again, seconds=0)
    assert first.error is None
    assert len(first.curve) == 2
    assert math.isfinite(first.validation + first.test + first.forgetting)


@pytest.fixture
def moments() -> Moments:
    torch.manual_seed(0)
    weight, x, own, g = (torch.randn(n, d, dtype=torch.float64) for n, d in ((12, 8), (50, 8), (50, 8), (50, 12)))
    y = x @ weight.T
    return Moments(weight, x.T @ x / 50, y.T @ y / 50, g.T @ g, lambda: own.T @ own / 50)


@pytest.mark.parametrize("name", starts.TRIED)
def test_an_experimental_initialisation_has_the_properties_in_its_description(name: str, moments: Moments) -> None:
    start = starts.TRIED[name](moments, 4)
    assert (start.a0.shape, start.b0.shape) == ((4, 8), (12, 4))
    eye = torch.eye(4, dtype=torch.float64)
    if name in ("inputs", "contrast", "soft_contrast"):
        assert not start.b0.any()
    elif name not in ("balanced_principal", "whitened_tail"):
        assert torch.allclose(start.b0.T @ start.b0, eye)
    if name in ("gradient", "gradient_tail"):
        assert torch.allclose(start.a0, start.b0.T @ moments.weight)
    if name.startswith("inputs"):
        assert torch.allclose(start.a0 @ start.a0.T, eye)
        energy = (start.a0 @ moments.inputs @ start.a0.T).trace()
        assert torch.allclose(energy, torch.linalg.eigvalsh(moments.inputs)[-4:].sum())
    if name.startswith("contrast") or name == "soft_contrast":
        assert torch.allclose(start.a0.norm(dim=1), torch.ones(4, dtype=torch.float64))
    if name == "balanced_principal":
        assert torch.allclose(start.a0.norm(dim=1), start.b0.norm(dim=0))
        q = torch.linalg.eigh(moments.outputs).eigenvectors[:, -4:]
        assert torch.allclose(start.b0 @ start.a0, q @ q.T @ moments.weight)
    if name.startswith("scaled"):
        variance = (start.a0 @ moments.inputs @ start.a0.T).diagonal()
        assert float(variance.mean()) == pytest.approx(1)
        assert torch.linalg.matrix_rank(torch.cat([start.a0, start.b0.T @ moments.weight])) == 4  # one scalar per layer
    if name == "whitened_tail":
        variance = (start.a0 @ moments.inputs @ start.a0.T).diagonal()
        assert torch.allclose(variance, torch.ones(4, dtype=torch.float64))


def test_contrast_reads_the_directions_of_the_task_only() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    task, own = basis[:, :6], basis[:, 3:]  # three directions are only in the task
    weight = torch.randn(4, 8, dtype=torch.float64)
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    start = starts.contrast(Moments(weight, task @ task.T, nothing, nothing, lambda: own @ own.T), 3)
    assert (start.a0 @ basis[:, 3:]).abs().max() < 0.02
    assert torch.linalg.matrix_rank(start.a0 @ basis[:, :3]) == 3
