"""What happens to adapters, as it happens: for the admin API, the metrics and the log."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

KEPT = 4096


@dataclass(frozen=True)
class Event:
    """Something happened to an adapter.

    `event` is a state that it entered (see `reconcile`), or one of: prepared, loaded, load_failed, probe_failed,
    unloaded, removed; document_failed is of none.
    """

    adapter: str
    event: str
    version: str | None = None
    reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # how long what led here took, by its parts
    time: float = field(default_factory=time.time)


class Journal:
    """The newest events, and who wants to know of each."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque(maxlen=KEPT)
        self.readers: list[Callable[[Event], None]] = []
        self._count = 0
        self._news = asyncio.Event()  # each is set once, at the next event

    def tell(self, event: Event) -> None:
        """Add an event."""
        self.events.append(event)
        self._count += 1
        for reader in self.readers:
            reader(event)
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def change(self) -> None:
        """Wait for the next event."""
        await self._news.wait()

    async def follow(self) -> AsyncIterator[Event]:
        """Yield the events that there are, and then each one as it happens."""
        seen = self._count - len(self.events)
        while True:
            new = min(self._count - seen, len(self.events))
            seen = self._count
            for event in list(self.events)[len(self.events) - new :]:
                yield event
            if seen == self._count:
                await self.change()
