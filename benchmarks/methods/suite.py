"""The trials of each part of the benchmark, given the results so far.

Each part is a pure function (suite, results) -> trials. The best learning rate determines later trials, so a part is
called again until none of its trials is missing. The figures look up results by the same trials.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks.methods import starts
from benchmarks.methods.sweep import SEEDS, Sweep, at_best, power_of, with_seeds
from benchmarks.methods.trial import Results, Trial

CODE, MATH, ANSWERS = "cpp", "math", "intent"  # ANSWERS: the share of exact answers differs between methods
OTHER, CLASSES = "python", "topic"  # the tasks of the other base and of the encoder
TASKS, FAMILIES = (CODE, MATH), (CODE, MATH, ANSWERS)  # of the core table, and of figure 5
FIRST = {"full": -3, "mica": 1, "tail_frozen": 1}  # lowest rate of a sweep as a power of two around 1e-3; default 0
CORE = [m for m in starts.METHODS if m != "middle"]
FEW = ("lora", "pissa", "tail", "principal", "full")
FIXED = 0  # the one rate of the paper's protocol: 1e-3 x 2^FIXED
SUBSPACES = ("tail", "principal", "middle", "random")
OVER_RANKS = ("lora", "tail", "principal")
CALIBRATED = ("tail", "principal")  # with other text, and with other numbers of rows
MEASURED = ("lora", "tail", "principal", "full")  # for the effective rank of the outputs
SIZES = (8, 32, 128, 256)  # calibration rows
SCALINGS = (0.5, 1.0, 2.0)  # alpha / rank


@dataclass(frozen=True)
class Suite:
    """The bases of a suite and the size of its runs."""

    name: str
    base: str
    other_base: str
    encoder: str
    rank: int
    ranks: tuple[int, ...]
    steps: int
    batch_size: int

    def trial(self, task: str, method: str, *, rank: int | None = None, base: str | None = None) -> Trial:
        """Return a trial of this suite's size, with a learning rate of 0 for a sweep to replace."""
        return Trial(base or self.base, task, method, rank or self.rank, 0.0, self.steps, self.batch_size)

    def sweep(self, task: str, method: str, base: str | None = None) -> Sweep:
        """Return the learning-rate search of a method at the suite's rank."""
        return Sweep(self.trial(task, method, base=base), FIRST.get(method, 0))


SUITES = {
    "small": Suite("small", "embedded", "qwen", "encoder", 8, (2, 8, 32, 128), 100, 8),
    "medium": Suite("medium", "llama-100m", "qwen", "encoder", 16, (4, 16, 64, 256), 300, 32),
}


def core(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials of the table: every method on two tasks, each at its best rate."""
    return _swept(suite, results, TASKS, CORE)


def fixed_rate(suite: Suite, results: Results) -> list[Trial]:  # noqa: ARG001 (results do not matter)
    """Return the trials of the paper's protocol: every method at one rate."""
    trials = [suite.sweep(task, method).at(FIXED) for task in TASKS for method in CORE]
    return [replace(trial, seed=seed) for trial in trials for seed in SEEDS]


def figure1(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials for loss and gradient norm: tail at several ranks, LoRA at the highest, full fine-tuning."""
    found = _swept(suite, results, [CODE], ["full"])
    for rank in suite.ranks:
        found += _swept_at(suite, results, rank, "tail", CODE)
    return found + _swept_at(suite, results, suite.ranks[-1], "lora", CODE)


def figure2(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials for metric and loss by rank, and for other calibration texts and sizes."""
    found = _other_calibrations(suite, results)
    for method in OVER_RANKS:
        for rank in suite.ranks[:-1]:  # the largest takes three times as long, and is in figure 1
            found += _swept_at(suite, results, rank, method, ANSWERS)
    return found


def _other_calibrations(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials with another calibration than the core table has, at the rates of the core table."""
    found = []
    for method in CALIBRATED:
        for trial, _ in at_best(suite.sweep(CODE, method), results):
            found += [replace(trial, calibration=text) for text in ("other", "random")]
            found += [replace(trial, calibration_rows=n) for n in SIZES if n != trial.calibration_rows]
    return found + _swept(suite, results, [CODE], CALIBRATED)


def figure3(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials for the effective rank of the outputs before and after training."""
    found = _swept(suite, results, [CODE], MEASURED)
    for method in MEASURED:
        found += [replace(t, spectra=True) for t, _ in at_best(suite.sweep(CODE, method), results, SEEDS[:1])]
    return found


def figure4(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials of the four subspaces."""
    return _swept(suite, results, TASKS, SUBSPACES)


def figure5(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials for loss curves on three families of tasks."""
    return _swept(suite, results, FAMILIES, FEW)


def other_base(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials of the base with another architecture and other pre-training text."""
    return _swept(suite, results, [OTHER], (*FEW, "random", "eva", "lora_ga"), suite.other_base)


def encoder(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials of classification with a masked language model."""
    return _swept(suite, results, [CLASSES], (*FEW, "random"), suite.encoder)


def scaling(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials that show whether alpha needs a search of its own, beside the learning rate."""
    return [trial for value in SCALINGS for trial in with_seeds(at_scaling(suite, value), results)]


def tried(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials of experimental initialisations: all on the code task, PROMISING also elsewhere."""
    found = _swept(suite, results, [CODE], starts.TRIED)
    found += _swept(suite, results, [MATH, ANSWERS], starts.PROMISING)
    return found + _swept(suite, results, [OTHER], starts.PROMISING, suite.other_base)


PARTS: dict[str, Callable[[Suite, Results], list[Trial]]] = {
    "core": core,
    "fixed_rate": fixed_rate,
    "figure1": figure1,
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "other_base": other_base,
    "encoder": encoder,
    "scaling": scaling,
    "tried": tried,
}


def missing(parts: Iterable[str], suite: Suite, results: Results) -> list[Trial]:
    """Return the trials of `parts` that are not in `results`, each once, in the order of the parts."""
    wanted = dict.fromkeys(trial for part in parts for trial in PARTS[part](suite, results))
    return [trial for trial in wanted if trial not in results]


def at_rank(suite: Suite, results: Results, rank: int, method: str, task: str) -> Sweep | None:
    """Return the search at `rank`: five rates around the best one of the suite's rank, or None if that is unknown."""
    default = suite.sweep(task, method)
    best = default.best(results)
    if rank == suite.rank or best is None:
        return default if best else None
    return Sweep(suite.trial(task, method, rank=rank), power_of(best.learning_rate) - 2)


def at_scaling(suite: Suite, value: float) -> Sweep:
    """Return the learning-rate search of the tail with the scaling alpha / rank = `value`."""
    default = suite.sweep(CODE, "tail")
    return replace(default, of=replace(default.of, scaling=value))


def _swept_at(suite: Suite, results: Results, rank: int, method: str, task: str) -> list[Trial]:
    sweep = at_rank(suite, results, rank, method, task)
    return suite.sweep(task, method).trials(results) + (with_seeds(sweep, results) if sweep else [])


def _swept(
    suite: Suite, results: Results, tasks: Iterable[str], methods: Iterable[str], base: str | None = None
) -> list[Trial]:
    sweeps = [suite.sweep(task, method, base) for task in tasks for method in methods]
    return [trial for sweep in sweeps for trial in with_seeds(sweep, results)]
