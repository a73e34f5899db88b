"""How far an adapter's entry is on its way to being served, and how long each phase took."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event, Events
from astra_serve.document.desired import Adapter


class Phase(StrEnum):
    """A phase of an entry. LOADING covers the wait for memory, the load and the probe of its versions."""

    PENDING = "pending"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    LOADING = "loading"
    SERVING = "serving"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        """Return whether nothing more happens to the entry, unless it is tried again."""
        return self in (Phase.SERVING, Phase.FAILED)


@dataclass(frozen=True)
class Spent:
    """The time that a change took before the reconciler follows its entry."""

    began: float  # when the change was asked for, by the server's clock
    seconds: dict[str, float]  # the duration of each phase of its preparation


@dataclass
class Status:
    """One entry, its phase and the reason of a failure."""

    entry: Adapter
    events: Events
    clock: Clock
    phase: Phase = Phase.PENDING
    reason: str | None = None
    since: float = field(default_factory=time.time)  # seconds since 1970
    seconds: dict[str, float] = field(default_factory=dict)  # the duration of each phase before this one
    seen: dict[str, list[Any]] = field(default_factory=dict)  # fingerprints of the sources before they were read
    parts: dict[str, float] = field(default_factory=dict)  # loading and probing, as parts of the phase LOADING
    began: float | None = None  # when the change was asked for, by the server's clock; None: now

    def __post_init__(self) -> None:
        self._entered = self.clock.now()
        self._began = self._entered if self.began is None else self.began

    def enter(self, phase: Phase, reason: str | None = None, version: str | None = None) -> None:
        """Begin a phase and emit its event."""
        self.seconds, self.parts = self.elapsed(), {}
        self.phase, self.reason, self.since, self._entered = phase, reason, time.time(), self.clock.now()
        if phase is not Phase.LOADING:  # `residency` emits the parts of that phase
            seconds = dict(self.seconds) if phase.final else {}
            total = self._entered - self._began if phase is Phase.SERVING else None
            self.events.emit(Event(self.entry.name, phase, version, reason, seconds, total))

    def elapsed(self) -> dict[str, float]:
        """Return the seconds of each phase until now; of LOADING its parts, and the wait for memory."""
        duration = self.clock.now() - self._entered
        waiting = {"waiting": max(0.0, duration - sum(self.parts.values()))}
        found = dict(self.seconds)
        for part, seconds in (
            {**waiting, **self.parts} if self.phase is Phase.LOADING else {self.phase: duration}
        ).items():
            found[part] = found.get(part, 0.0) + seconds
        return found
