"""The events of adapters, as they happen: for the admin API, the metrics and the log."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

KEPT = 4096


@dataclass(frozen=True)
class Event:
    """Something happened to an adapter.

    `event` is a state of its publication (see `control.reconcile`), or one of: loading, probing, loaded, load_failed,
    probe_failed, unloaded (a version in the engine); prepared, removed; document_failed, keys_failed, usage_failed,
    usage_written, limits_store_failed, limits_store_recovered, which concern no adapter.
    """

    adapter: str
    event: str
    version: str | None = None
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # the duration of the steps that led to it
    total: float | None = None  # of a version that serves now: seconds from the change to the flip, with all waits
    time: float = field(default_factory=time.time)  # seconds since 1970


class Events:
    """The newest events, and the functions that are called with each."""

    def __init__(self) -> None:
        self.newest: deque[Event] = deque(maxlen=KEPT)
        self.subscribers: list[Callable[[Event], None]] = []
        self._count = 0
        self._emitted = asyncio.Event()  # a new one for each event

    def emit(self, event: Event) -> None:
        """Keep an event and call the subscribers."""
        self.newest.append(event)
        self._count += 1
        for subscriber in self.subscribers:
            subscriber(event)
        emitted, self._emitted = self._emitted, asyncio.Event()
        emitted.set()

    async def change(self) -> None:
        """Wait for the next event."""
        await self._emitted.wait()

    async def follow(self) -> AsyncIterator[Event]:
        """Yield the newest events, and then each one as it happens."""
        seen = self._count - len(self.newest)
        while True:
            new = min(self._count - seen, len(self.newest))
            seen = self._count
            for event in list(self.newest)[len(self.newest) - new :]:
                yield event
            if seen == self._count:
                await self.change()
