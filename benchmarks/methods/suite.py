"""What is compared: for each part of the benchmark the trials that it needs, given the results that there are.

Every part is a pure function (suite, results) -> trials: the best learning rate decides what comes next, so a part is
asked again until nothing that it names is missing. The drawings read the same results by the same names.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks.methods import starts
from benchmarks.methods.sweep import SEEDS, Sweep, at_best, power_of, with_seeds
from benchmarks.methods.trial import Results, Trial

CODE, MATH, ANSWERS = "cpp", "math", "intent"  # the last one's exact answers tell adapters apart
OTHER, CLASSES = "python", "topic"  # the other base's task, and the encoder's
TASKS, FAMILIES = (CODE, MATH), (CODE, MATH, ANSWERS)  # of the core table, and of figure 5
FIRST = {"full": -3, "mica": 1, "tail_frozen": 1}  # the lowest rate of a sweep: 1e-3 x 2^this; others begin at 0
CORE = [m for m in starts.METHODS if m != "middle"]
FEW = ("lora", "pissa", "tail", "principal", "full")
FIXED = 0  # the paper's own protocol: every method at the rate 1e-3 x 2^this
SUBSPACES = ("tail", "principal", "middle", "random")
OVER_RANKS = ("lora", "tail", "principal")
CALIBRATED = ("tail", "principal")  # with other text, and with more and less of it
MEASURED = ("lora", "tail", "principal", "full")  # their outputs' effective rank
SIZES = (8, 32, 128, 256)
SCALINGS = (0.5, 1.0, 2.0)  # alpha / rank


@dataclass(frozen=True)
class Suite:
    """The bases, and the size of a run."""

    name: str
    base: str
    other_base: str
    encoder: str
    rank: int
    ranks: tuple[int, ...]
    steps: int
    batch_size: int

    def trial(self, task: str, method: str, *, rank: int | None = None, base: str | None = None) -> Trial:
        """Return a trial of this suite's size; its learning rate is a sweep's to choose."""
        return Trial(base or self.base, task, method, rank or self.rank, 0.0, self.steps, self.batch_size)

    def sweep(self, task: str, method: str, base: str | None = None) -> Sweep:
        """Return a method's search at the suite's rank."""
        return Sweep(self.trial(task, method, base=base), FIRST.get(method, 0))


SUITES = {
    "small": Suite("small", "embedded", "qwen", "encoder", 8, (2, 8, 32, 128), 100, 8),
    "medium": Suite("medium", "llama-100m", "qwen", "encoder", 16, (4, 16, 64, 256), 300, 32),
}


def core(suite: Suite, results: Results) -> list[Trial]:
    """Every method on two tasks, each at its own best rate: the table."""
    return _swept(suite, results, TASKS, CORE)


def fixed_rate(suite: Suite, results: Results) -> list[Trial]:  # noqa: ARG001 (no result decides it)
    """The paper's own protocol: every method at one rate."""
    trials = [suite.sweep(task, method).at(FIXED) for task in TASKS for method in CORE]
    return [replace(trial, seed=seed) for trial in trials for seed in SEEDS]


def figure1(suite: Suite, results: Results) -> list[Trial]:
    """Loss and gradient norm: Astra at several ranks, LoRA at the highest one, full fine-tuning."""
    found = _swept(suite, results, [CODE], ["full"])
    for rank in suite.ranks:
        found += _swept_at(suite, results, rank, "tail", CODE)
    return found + _swept_at(suite, results, suite.ranks[-1], "lora", CODE)


def figure2(suite: Suite, results: Results) -> list[Trial]:
    """Metric and loss over the rank; whose text calibrates, and how much of it."""
    found = _calibrated_otherwise(suite, results)
    for method in OVER_RANKS:
        for rank in suite.ranks[:-1]:  # the largest takes three times as long: figure 1 has it
            found += _swept_at(suite, results, rank, method, ANSWERS)
    return found


def _calibrated_otherwise(suite: Suite, results: Results) -> list[Trial]:
    """Return the trials of figure 2 that calibrate otherwise than the core table, at the core table's rates."""
    found = []
    for method in CALIBRATED:
        for trial, _ in at_best(suite.sweep(CODE, method), results):
            found += [replace(trial, calibration=text) for text in ("other", "random")]
            found += [replace(trial, calibration_rows=n) for n in SIZES if n != trial.calibration_rows]
    return found + _swept(suite, results, [CODE], CALIBRATED)


def figure3(suite: Suite, results: Results) -> list[Trial]:
    """Effective rank of the outputs before and after training."""
    found = _swept(suite, results, [CODE], MEASURED)
    for method in MEASURED:
        found += [replace(t, spectra=True) for t, _ in at_best(suite.sweep(CODE, method), results, SEEDS[:1])]
    return found


def figure4(suite: Suite, results: Results) -> list[Trial]:
    """The four subspaces."""
    return _swept(suite, results, TASKS, SUBSPACES)


def figure5(suite: Suite, results: Results) -> list[Trial]:
    """Loss curves on three families of tasks."""
    return _swept(suite, results, FAMILIES, FEW)


def other_base(suite: Suite, results: Results) -> list[Trial]:
    """The same question on another architecture that knows other text."""
    return _swept(suite, results, [OTHER], (*FEW, "random", "eva", "lora_ga"), suite.other_base)


def encoder(suite: Suite, results: Results) -> list[Trial]:
    """Classification on a masked language model."""
    return _swept(suite, results, [CLASSES], (*FEW, "random"), suite.encoder)


def scaling(suite: Suite, results: Results) -> list[Trial]:
    """Whether alpha is worth a search of its own, beside the learning rate."""
    return [trial for value in SCALINGS for trial in with_seeds(at_scaling(suite, value), results)]


def tried(suite: Suite, results: Results) -> list[Trial]:
    """Ideas for a better start, on the code task; those worth it on the other tasks and the other base, too."""
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
    """Return the trials that the parts need next, each once, in their order."""
    wanted = dict.fromkeys(trial for part in parts for trial in PARTS[part](suite, results))
    return [trial for trial in wanted if trial not in results]


def at_rank(suite: Suite, results: Results, rank: int, method: str, task: str) -> Sweep | None:
    """Return a search at another rank: five rates around the best one of the suite's own rank, once it is known."""
    usual = suite.sweep(task, method)
    best = usual.best(results)
    if rank == suite.rank or best is None:
        return usual if best else None
    return Sweep(suite.trial(task, method, rank=rank), power_of(best.learning_rate) - 2)


def at_scaling(suite: Suite, value: float) -> Sweep:
    """Return the tail's search with another scaling of the change."""
    usual = suite.sweep(CODE, "tail")
    return replace(usual, of=replace(usual.of, scaling=value))


def _swept_at(suite: Suite, results: Results, rank: int, method: str, task: str) -> list[Trial]:
    sweep = at_rank(suite, results, rank, method, task)
    return suite.sweep(task, method).trials(results) + (with_seeds(sweep, results) if sweep else [])


def _swept(
    suite: Suite, results: Results, tasks: Iterable[str], methods: Iterable[str], base: str | None = None
) -> list[Trial]:
    sweeps = [suite.sweep(task, method, base) for task in tasks for method in methods]
    return [trial for sweep in sweeps for trial in with_seeds(sweep, results)]
