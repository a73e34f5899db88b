"""One run of the comparison: its settings, its outcome, and the JSON-lines file that holds all runs of a suite."""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.methods.tasks import CLASSES
from trainer.config import TrainConfig

PROTOCOL = 1  # increase it when a change of data or training makes older runs incomparable


@dataclass(frozen=True)
class Trial:
    """The settings of one run: base, task, method and every number on which the outcome depends."""

    base: str
    task: str
    method: str
    rank: int
    learning_rate: float
    steps: int
    batch_size: int
    seed: int = 0
    calibration: Literal["own", "other", "random"] = "own"  # the text for calibration
    calibration_rows: int = 128
    scaling: float = 1.0  # alpha / rank
    spectra: bool = False  # also measure the effective rank of the outputs before and after training
    max_length: int = 96  # tokens per row

    @property
    def name(self) -> str:
        """Return a readable name that ends with a digest of PROTOCOL and of every field that differs from its default.

        A new field with a default does not change the names of older runs.
        """
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        text = json.dumps([PROTOCOL, changed], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.base}.{self.task}.{self.method}.r{self.rank}.{self.learning_rate:g}.s{self.seed}.{digest}"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. Losses are nats per target token (classification: per row) on held-out rows.

    If the run diverged, `error` is the reason, and the losses are infinite.
    """

    validation: float = math.inf  # selects the learning rate
    test: float = math.inf  # is reported
    metric: float | None = None  # share of exact answers (language model) or right classes, on test rows
    forgetting: float = math.inf  # loss on the base's own text: after - before; infinite without a language head
    curve: list[float] = field(default_factory=list)  # training loss of every step
    gradients: list[float] = field(default_factory=list)  # global gradient norm of every step, before clipping
    effective_rank: dict[str, tuple[float, float]] = field(default_factory=dict)  # by layer: before and after training
    parameters: int = 0  # number of trained ones
    seconds: float = 0.0
    error: str | None = None


class Results:
    """The runs of one suite: a JSON-lines file that is read once and then only appended to.

    Each line is an object with `name`, `trial`, `outcome` and `env`. If a trial has several lines, the last one counts.
    """

    def __init__(self, file: Path) -> None:
        """Read the runs in `file`, which need not exist yet.

        Runs of another PROTOCOL are ignored. So are incomplete lines, which a killed process may have written; `torn`
        counts them.
        """
        self.file = file
        self.torn = 0
        self.ignored: list[str] = []  # names of runs of another PROTOCOL
        self._found: dict[Trial, Outcome] = {}
        self._environments: dict[Trial, dict[str, Any]] = {}
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        for line in filter(None, lines):
            try:
                record = json.loads(line)
            except ValueError:  # a part of a JSON object is never valid JSON
                self.torn += 1
                continue
            trial = Trial(**record["trial"])
            if trial.name == record["name"]:
                self._keep(trial, record["outcome"], record["env"])
            else:
                self.ignored.append(record["name"])

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Return the environment of every run."""
        return list(self._environments.values())

    def __contains__(self, trial: Trial) -> bool:
        return trial in self._found

    def __getitem__(self, trial: Trial) -> Outcome:
        return self._found[trial]

    def get(self, trial: Trial) -> Outcome | None:
        """Return a run's outcome, or None."""
        return self._found.get(trial)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, trial: Trial, outcome: Outcome, env: dict[str, Any]) -> None:
        """Append a run to the file, then keep it in memory; infinity and NaN, which JSON does not have, become null.

        Raises OSError.
        """
        recorded = {key: _finite(value) for key, value in asdict(outcome).items()}
        record = {"name": trial.name, "trial": asdict(trial), "outcome": recorded, "env": env}
        _append(self.file, json.dumps(record, allow_nan=False))
        self._keep(trial, recorded, env)

    def _keep(self, trial: Trial, recorded: dict[str, Any], env: dict[str, Any]) -> None:
        self._found[trial] = _outcome(recorded)
        self._environments[trial] = env


def _append(file: Path, line: str) -> None:
    """Append `line` to `file` and wait until it is on disk. Raises OSError.

    The lock separates the lines of several processes. If the file ends with an incomplete line, a newline comes first,
    so that the new line is not damaged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        if stream.read() not in (b"", b"\n"):
            line = "\n" + line
        stream.write(f"{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def _outcome(recorded: dict[str, Any]) -> Outcome:
    """Return the outcome that `Results.add` recorded; null was a number that is not finite, and becomes infinity."""
    numbers: dict[str, Any] = {}
    for key in ("validation", "test", "forgetting"):
        numbers[key] = math.inf if recorded[key] is None else recorded[key]
    for key in ("curve", "gradients"):
        numbers[key] = [math.inf if value is None else value for value in recorded[key]]
    ranks = {name: (before, after) for name, (before, after) in recorded["effective_rank"].items()}
    return Outcome(**{**recorded, **numbers, "effective_rank": ranks})


def config_of(trial: Trial, settings: dict[str, Any]) -> TrainConfig:
    """Return the trainer's configuration for `trial`, whose method has `settings`."""
    task: dict[str, Any] = {"task": "classification"} if trial.task in CLASSES else {}
    return TrainConfig(
        rank=trial.rank,
        alpha=trial.rank * trial.scaling,
        learning_rate=trial.learning_rate,
        steps=trial.steps,
        batch_size=trial.batch_size,
        seed=trial.seed,
        max_length=trial.max_length,
        calibration_rows=trial.calibration_rows,
        calibration_overlap=1.0,
        spectra=False,
        save_steps=trial.steps,
        **task,
        **settings,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [_finite(v) for v in value] if isinstance(value, list) else value
