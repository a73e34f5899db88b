"""The suite on real models: which method gives the most accuracy for what it forgets?

SmolLM2-135M-Instruct learns tasks of `reasoning-gym`, which others have made; all-MiniLM-L6-v2, an encoder, classifies.
The learning rate of every method is searched around its own best value, as in the other suites. A method is a frontier:
the loss on its task against what it has forgotten, over the learning rates. Parts:

    core    six methods on three tasks of the chat model, one task after the other
    nlu     the same methods on a classification task of the encoder, and on one of ours
    fixed   the core at one rate for all, as in the paper
    rest    the other methods on the core's tasks, B frozen at the rank with as many trained weights, and a task of ours
    spectra      the effective rank of every layer's outputs before and after training, at each method's best rate
    calibration  the tail from 4 to 1,024 calibration rows, at its best rate
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest

from benchmarks.methods.sweep import SEEDS, Sweep, at_best, power_of, with_seeds
from benchmarks.methods.trial import Results, Trial

TASKS = ("chain_sum", "sentence_reordering", "gsm_symbolic")
NLU = ("syllogism", "topic")  # not family_relationships: nothing is learned in 100 steps
OURS = "intent"
CORE = ("lora", "pissa", "lora_ga", "tail", "tail_frozen", "principal")
REST = ("milora", "eva", "random", "full")
RANK = 8
CALIBRATION_ROWS = (4, 16, 256, 1024)  # and the 64 of the core
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


def with_spectra(results: Results) -> list[Trial]:
    """Return a run of each method at its best rate that also measures effective ranks."""
    best = [trial for task in TASKS for method in CORE for trial, _ in at_best(sweep(task, method), results, SEEDS[:1])]
    return [replace(trial, spectra=True) for trial in best]


def calibrated(results: Results) -> list[Trial]:
    """Return the tail's trials at its best rate on the first task, with other numbers of calibration rows."""
    best = sweep(TASKS[0], "tail").best(results)
    rows_and_seeds = [(rows, seed) for rows in CALIBRATION_ROWS for seed in SEEDS]
    return [replace(best, calibration_rows=rows, seed=seed) for rows, seed in rows_and_seeds] if best else []


PARTS: dict[str, Callable[[Results], list[Trial]]] = {
    "core": core,
    "nlu": nlu,
    "fixed": fixed,
    "rest": rest,
    "spectra": with_spectra,
    "calibration": calibrated,
}


def missing(parts: Iterable[str], results: Results) -> list[Trial]:
    """Return the trials of `parts` that are not in `results`, each once, in the order of the parts."""
    wanted = dict.fromkeys(trial for part in parts for trial in PARTS[part](results))
    return [trial for trial in wanted if trial not in results]


def searches_of(task: str) -> dict[str, Sweep]:
    """Return the searches of a task by the name of the method in the tables."""
    return {method: sweep(task, method) for method in (*CORE, *REST)} | {
        "tail_frozen, equal weights": sweep(task, "tail_frozen", 2 * RANK)
    }


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
