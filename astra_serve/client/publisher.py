"""Publishes snapshots beside other work, in a thread: one at a time, and at most one waits.

    submit, nothing in progress     published at once
    submit, one in progress         waits for its end
    submit, another one waits       replaces that one, which is never published

The one in progress is never interrupted: what it serves is a complete version, and the newest snapshot follows it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from astra_serve.client.state import AdapterState


@dataclass(frozen=True)
class Snapshot:
    """The LoRA of one step of a training."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """The end of one publish: the adapter as it serves, or the error."""

    snapshot: Snapshot
    result: AdapterState | Exception
    seconds: float


class Publisher:
    """The thread, which runs while there is something to publish; the end of the process does not wait for it."""

    def __init__(self, publish: Callable[[Snapshot], AdapterState]) -> None:
        """`publish` returns when a snapshot serves; what it raises is the outcome."""
        self._publish = publish
        self._changed = threading.Condition()
        self._waiting: Snapshot | None = None
        self._works = False
        self._outcomes: list[Outcome] = []

    def submit(self, snapshot: Snapshot) -> Snapshot | None:
        """Publish a snapshot when it is its turn, and return the one that it replaces, if one waited."""
        with self._changed:
            replaced, self._waiting = self._waiting, snapshot
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="astra-publish", daemon=True).start()
        return replaced

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes since the last call, in their order."""
        with self._changed:
            found, self._outcomes = self._outcomes, []
        return found

    def wait(self) -> None:
        """Wait until nothing is in progress, and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: not self._works)

    def _work(self) -> None:
        while True:
            with self._changed:
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    self._works = False
                    self._changed.notify_all()
                    return
            began = time.monotonic()
            result: AdapterState | Exception
            try:
                result = self._publish(snapshot)
            except Exception as error:  # whatever it is, the thread that reads the outcomes has to know it
                result = error
            with self._changed:
                self._outcomes.append(Outcome(snapshot, result, time.monotonic() - began))
