"""From the desired state to what is served: one sequential worker for each adapter, independent of all others.

    pending -> fetching -> verifying -> loading -> serving: the alias points at the new version
                  |            |           |
                  +------------+-----------+-----> failed: the version before, if any, still serves

A worker turns the newest entry of its adapter into an outcome. If the entry names a digest that the store has, the
version is read and compared with its digest, and not fetched. A failure that may heal by itself (a source that cannot
be read, or does not have the digest that the entry names; a store that cannot be written) is tried again after 1, 5,
30, 120 s and then every 120 s. Where the engine has no memory for it, that is 5 s. After any failure a source that was
read is looked at every 5 s, and tried again as soon as it changes: it may have been copied while it was read. Otherwise
a failure is tried again when its entry changes, or when a document that could not be read is readable again. A version
that fails after it has served is brought again (`housekeeping`). A newer entry ends the attempt of the one before.
"""

import asyncio
import logging
import math
from dataclasses import dataclass

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.version import Alias, Version
from astra_serve.control.preparation import Preparation, Prepared
from astra_serve.control.status import Phase, Spent, Status
from astra_serve.document.desired import Adapter
from astra_serve.document.history import source_of
from astra_serve.errors import CannotFetch, CannotStore, Damaged, Unavailable
from converter.errors import AstraError

RETRIES_S = (1.0, 5.0, 30.0, 120.0)  # waits between tries; the last one again and again
LOOK_S = 5.0  # between two looks at a source that failed

logger = logging.getLogger("vllm.astra_serve")


@dataclass(frozen=True)
class RetryAfter:
    """An attempt failed, and the same may succeed after so many seconds."""

    reason: str
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An attempt failed, and would fail again with the same sources."""

    reason: str


def outcome_of(error: Exception, tries: int) -> RetryAfter | Failed:
    """Return the outcome of an attempt that raised `error`, after `tries` earlier ones."""
    if isinstance(error, Unavailable):
        if error.retry_after_s is not None:  # no memory in the engine
            return RetryAfter(str(error), float(error.retry_after_s))
        if isinstance(error.__cause__, Exception):
            return outcome_of(error.__cause__, tries)
    if isinstance(error, CannotFetch | CannotStore | Damaged | OSError):
        seconds = RETRIES_S[min(tries, len(RETRIES_S) - 1)]
        return RetryAfter(f"{error}; trying again in {seconds:.0f} s", seconds)
    if isinstance(error, AstraError):
        return Failed(str(error))
    return Failed(f"{type(error).__name__}: {error}")


class Reconciler:
    """Lets a fleet serve the entries that are wanted."""

    def __init__(self, fleet: Fleet, preparation: Preparation, clock: Clock, drain_s: float) -> None:
        """Requests have `drain_s` seconds to end when their version is replaced."""
        self.status: dict[str, Status] = {}
        self._fleet, self._preparation, self._clock, self._drain_s = fleet, preparation, clock, drain_s
        self._new: asyncio.Queue[str] = asyncio.Queue()  # names without a worker
        self._workers: dict[str, tuple[asyncio.Event, asyncio.Task[None] | None]] = {}

    async def run(self) -> None:
        """Start the workers until cancelled."""
        async with asyncio.TaskGroup() as workers:
            while True:
                workers.create_task(self._work(await self._new.get()))

    def want(self, entry: Adapter, *, again: bool = False, spent: Spent | None = None) -> None:
        """Serve an adapter as `entry` says, if it is another entry than before, or is to be tried `again`.

        `spent` is the time that its preparation took, for its status.
        """
        name, known = entry.name, self.status.get(entry.name)
        if again or known is None or known.entry != entry:
            self._fleet.expected.add(name)
            began, seconds = (spent.began, spent.seconds) if spent else (None, {})
            self.status[name] = Status(entry, self._fleet.events, self._clock, seconds=seconds, began=began)
            self._restart(name)

    def remove(self, name: str) -> None:
        """Serve nothing under `name` any more."""
        if self.status.pop(name, None):
            self._restart(name)
            self._fleet.expected.discard(name)
            if name in self._fleet.aliases:
                self._fleet.drop(name, self._drain_s)
            self._fleet.events.emit(Event(name, "removed"))

    def retry(self) -> None:
        """Try the entries that failed again, now."""
        for status in list(self.status.values()):
            if status.phase is Phase.FAILED:
                self.want(status.entry, again=True)

    async def outcome(self, name: str) -> Status | None:
        """Wait until an adapter is served or failed, and return its status; None where it is not wanted."""
        while (status := self.status.get(name)) and not status.phase.final:
            await self._fleet.events.change()
        return status

    def _restart(self, name: str) -> None:
        if name not in self._workers:
            self._workers[name] = asyncio.Event(), None
            self._new.put_nowait(name)
            return
        wanted, attempt = self._workers[name]
        wanted.set()
        if attempt:
            attempt.cancel()

    async def _work(self, name: str) -> None:
        """Bring one entry after the other to its outcome, until the adapter is not wanted any more."""
        wanted, _ = self._workers[name]
        while status := self.status.get(name):
            wanted.clear()
            attempt = asyncio.create_task(self._bring(status))
            self._workers[name] = wanted, attempt
            try:
                await asyncio.wait([attempt])
                if not attempt.cancelled():
                    attempt.result()
                    await wanted.wait()
            finally:
                attempt.cancel()
        del self._workers[name]

    async def _bring(self, status: Status) -> None:
        """Try to serve an entry until it is served, or has failed for good."""
        tries = 0
        while outcome := await self._attempt(status, tries):
            status.enter(Phase.FAILED, outcome.reason)
            if isinstance(outcome, Failed) and not status.seen:
                return
            await self._until_due(status, outcome.seconds if isinstance(outcome, RetryAfter) else math.inf)
            tries += 1
            status.enter(Phase.PENDING)

    async def _attempt(self, status: Status, tries: int) -> RetryAfter | Failed | None:
        """Serve an entry; return the outcome if that failed."""
        entry = status.entry
        try:
            async with self._preparation.hold(entry, status, again=False) as prepared:
                self._fleet.point(entry.name, _alias(entry, prepared), self._drain_s)
                status.enter(Phase.SERVING, version=prepared.current.name)
        except Exception as error:
            outcome = outcome_of(error, tries)
            if not isinstance(error, AstraError | OSError):  # a fault of ours: neither unseen, nor the end of others
                logger.exception("adapter %r cannot be served", entry.name)
            return outcome
        return None

    async def _until_due(self, status: Status, seconds: float) -> None:
        """Wait so many seconds, or until a source is another one than before it was read."""
        due = self._clock.now() + seconds
        while (left := due - self._clock.now()) > 0:
            await self._clock.sleep(min(LOOK_S, left))
            for source, seen in status.seen.items():
                found = await self._preparation.sources.fingerprint(source)
                if found and found != seen:  # one that does not answer is no other one
                    return


def _alias(entry: Adapter, prepared: Prepared) -> Alias:
    steps = (Version(entry.name, step.digest) for step in entry.steps)
    return Alias(
        current=prepared.current,
        previous=tuple(version for version in steps if version != prepared.current),
        canary=prepared.canary,
        weight=entry.canary.weight if entry.canary else 0.0,
        pinned=entry.pin,
        source=source_of(entry),
    )
