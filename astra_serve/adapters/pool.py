"""Bounded pools for work that may hang: no origin takes more than its share, and the end of the server waits for none.

The default threads of asyncio are for work on the machine itself: a hung source would take them from requests, and
Python waits for them before a process ends.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from threading import Thread
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Slots:
    """At most `most` slots in use, at most `share` of them by one origin; those who wait are served in their order."""

    def __init__(self, most: int, share: int) -> None:
        self._most, self._share = most, share
        self._used: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def of(self, origin: str) -> AsyncIterator[None]:
        """Hold a slot until the block ends."""
        await self.acquire(origin)
        try:
            yield
        finally:
            self.release(origin)

    async def acquire(self, origin: str) -> None:
        """Wait for a slot."""
        waiter = origin, asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._grant()
        try:
            await waiter[1]
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:  # granted a moment before
                self.release(origin)
            raise

    def release(self, origin: str) -> None:
        """Give a slot back."""
        self._used[origin] -= 1
        self._used += Counter()  # drops the origins without a slot
        self._grant()

    def _grant(self) -> None:
        for waiter in list(self._waiting):
            origin, granted = waiter
            if self._used.total() < self._most and self._used[origin] < self._share and not granted.cancelled():
                self._waiting.remove(waiter)
                self._used[origin] += 1
                granted.set_result(None)


class Threads:
    """Daemon threads: a process can end while one of them hangs."""

    def __init__(self, most: int, share: int) -> None:
        self._slots = Slots(most, share)

    async def run(self, origin: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of `function`; when this is cancelled, the thread keeps its slot until it ends."""
        await self._slots.acquire(origin)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            self._slots.release(origin)
            if done.cancelled():
                return
            if error:
                done.set_exception(error)
            else:
                done.set_result(result)

        def work() -> None:
            result, error = None, None
            try:
                result = function(*args, **kwargs)
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(finish, result, error)

        Thread(target=work, name=f"astra-{origin}", daemon=True).start()
        return await done
