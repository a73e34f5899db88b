"""Monotonic time, and waiting for it. Tests move a clock of their own by hand."""

import asyncio
import math
import time
from contextlib import suppress


class Clock:
    """The time of one server, in seconds since some moment."""

    def now(self) -> float:
        """Return the seconds since some fixed moment."""
        return time.monotonic()

    async def wait(self, event: asyncio.Event, until: float = math.inf) -> bool:
        """Wait until `event` is set, at the latest `until` that time; return whether it is set."""
        with suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), None if until == math.inf else max(0.0, until - self.now()))
        return event.is_set()

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        await self.wait(asyncio.Event(), self.now() + seconds)
