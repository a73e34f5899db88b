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

from trainer.config import TrainConfig

PROTOCOL = 1  # raised when data or loop change so that older runs cannot stand beside newer ones


@dataclass(frozen=True)
class Trial:
    """A base, a task, a method and every number that the result depends on."""

    base: str
    task: str
    method: str
    rank: int
    learning_rate: float
    steps: int
    batch_size: int
    seed: int = 0
    calibration: Literal["own", "other", "random"] = "own"  # whose text the method looks at before training
    calibration_rows: int = 128
    scaling: float = 1.0  # alpha / rank
    spectra: bool = False  # also measure the effective rank of the outputs before and after

    @property
    def name(self) -> str:
        """Return a readable name that ends with a digest of PROTOCOL and of every field that differs from its default.

        A new field with a default does not change the names of older runs.
        """
        unusual = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        told = json.dumps([PROTOCOL, unusual], sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:10]
        return f"{self.base}.{self.task}.{self.method}.r{self.rank}.{self.learning_rate:g}.s{self.seed}.{digest}"


@dataclass(frozen=True)
class Outcome:
    """What a run found. Losses are nats per target token (classification: per row), on held-out rows after training.

    A run that diverged has its reason in `error`, and infinite losses.
    """

    validation: float = math.inf  # by this the learning rate is chosen
    test: float = math.inf  # and this is reported
    metric: float | None = None  # share of exact answers (language model) or right classes, on test rows
    forgetting: float = math.inf  # loss on the base's own text, after - before
    curve: list[float] = field(default_factory=list)  # training loss of every step
    gradients: list[float] = field(default_factory=list)  # global norm before clipping
    effective_rank: dict[str, tuple[float, float]] = field(default_factory=dict)  # by layer, before and after
    parameters: int = 0  # trained ones
    seconds: float = 0.0
    error: str | None = None


class Results:
    """The runs of one suite: a JSON-lines file that is read once and then only appended to.

    Each line is an object with `name`, `trial`, `outcome` and `env`. If a trial has several lines, the last one counts.
    """

    def __init__(self, file: Path) -> None:
        """Read every run of PROTOCOL in `file`, which need not exist yet.

        A line that a killed process wrote only in part is counted in `torn` and ignored, wherever it is in the file.
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
            except ValueError:  # no part of a JSON object is itself JSON
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
        told = {key: _finite(value) for key, value in asdict(outcome).items()}
        record = {"name": trial.name, "trial": asdict(trial), "outcome": told, "env": env}
        _append(self.file, json.dumps(record, allow_nan=False))
        self._keep(trial, told, env)

    def _keep(self, trial: Trial, told: dict[str, Any], env: dict[str, Any]) -> None:
        self._found[trial] = _outcome(told)
        self._environments[trial] = env


def _append(file: Path, line: str) -> None:
    """Append `line` to `file` and wait until it is on disk. Raises OSError.

    The lock keeps apart what several processes append. Where a killed process left part of a line, that part gets its
    newline first, so that it spoils no other line.
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


def _outcome(told: dict[str, Any]) -> Outcome:
    """Return what `Results.add` wrote; a number of null was not finite, which none is better than."""
    numbers: dict[str, Any] = {}
    for key in ("validation", "test", "forgetting"):
        numbers[key] = math.inf if told[key] is None else told[key]
    for key in ("curve", "gradients"):
        numbers[key] = [math.inf if value is None else value for value in told[key]]
    ranks = {name: (before, after) for name, (before, after) in told["effective_rank"].items()}
    return Outcome(**{**told, **numbers, "effective_rank": ranks})


def config_of(trial: Trial, settings: dict[str, Any]) -> TrainConfig:
    """Return the trainer's settings for a trial of a method with `settings`."""
    task: dict[str, Any] = {"task": "classification"} if trial.task == "topic" else {}
    return TrainConfig(
        rank=trial.rank,
        alpha=trial.rank * trial.scaling,
        learning_rate=trial.learning_rate,
        steps=trial.steps,
        batch_size=trial.batch_size,
        seed=trial.seed,
        max_length=96,
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
