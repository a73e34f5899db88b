"""Limits that hold with and without Redis: while it is away, each replica counts for itself alone.

The first call that fails, or takes longer than `TIMEOUT_S`, ends the use of Redis; requests do not ask it again. Each
`TICK_S` the store tries to write there, and goes on with the counters that it has kept. What requests have not
used meanwhile is given back then. Both changes are events, `limits_store_failed` and `limits_store_recovered`.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable
from typing import TypeVar

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event, Events
from astra_serve.document.keys import TenantLimits
from astra_serve.gateway.tenancy.quota.redis_store import LEASE_S, TIMEOUT_S, RedisStore
from astra_serve.gateway.tenancy.quota.store import Answer, MemoryStore, Reservation
from converter.errors import first_line

TICK_S = 1.0
T = TypeVar("T")
OWED = 10_000  # ended requests that are remembered while Redis is away


class Failover:
    """The counters of Redis, and those of this process while it is away."""

    def __init__(self, shared: RedisStore, own: MemoryStore, events: Events, clock: Clock) -> None:
        self.fault: str | None = None  # why Redis is not used now
        self._shared, self._own, self._events, self._clock = shared, own, events, clock
        self._running: dict[str, Reservation] = {}  # in Redis, by their ids
        self._owed: deque[tuple[Reservation, int]] = deque(maxlen=OWED)

    async def reserve(self, tenant: str, limits: TenantLimits, tokens: int) -> Answer:
        """Admit a request if no limit is exceeded by it."""
        if self.fault is None:
            try:
                answer = await _bounded(self._shared.reserve(tenant, limits, tokens))
            except Exception as error:
                self._failed(error)
            else:
                if answer.reservation:
                    self._running[answer.reservation.id] = answer.reservation
                return answer
        return await self._own.reserve(tenant, limits, tokens)

    async def settle(self, reservation: Reservation, used: int) -> None:
        """End a request that has used so many tokens, where it was counted."""
        if self._running.pop(reservation.id, None) is None:
            await self._own.settle(reservation, used)
            return
        if self.fault is None:
            try:
                await _bounded(self._shared.settle(reservation, used))
                return
            except Exception as error:
                self._failed(error)
        self._owed.append((reservation, used))

    async def run(self) -> None:
        """Renew the leases of running requests, and look for Redis while it is away."""
        async with self._shared:
            due = 0.0
            while True:
                try:
                    if self.fault is not None or due <= self._clock.now():
                        await self._look()
                        due = self._clock.now() + LEASE_S / 3
                except Exception as error:
                    self._failed(error)
                await self._clock.sleep(TICK_S)

    async def _look(self) -> None:
        """Bring Redis up to date, and use it from now on. Raises an error of any kind if it is not there."""
        await self._shared.check()
        await self._shared.renew(self._running.values())
        # Not renewed: Redis may have carried out a call that was given up, and then there is nothing to settle.
        while self._owed:
            await self._shared.settle(*self._owed[0])
            self._owed.popleft()
        if self.fault is not None:
            self.fault = None
            self._events.emit(Event("", "limits_store_recovered"))

    def _failed(self, error: Exception) -> None:
        if self.fault is None:
            self.fault = first_line(error).rstrip(".")
            self._events.emit(Event("", "limits_store_failed", reason=f"{self.fault}: each server counts for itself"))


async def _bounded(call: Awaitable[T]) -> T:
    async with asyncio.timeout(TIMEOUT_S):
        return await call
