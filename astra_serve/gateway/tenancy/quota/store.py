"""Where the use of tenants is counted: in this process, or (`redis_store`) in one place for all replicas.

A request is counted once, when it is admitted: as one request, and with as many tokens as it may use. When it has
ended, tokens that it has not used are given back to the minute and the day that they were taken from, if these still
count; those that it has used beyond its estimate are added to the present ones.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol
from uuid import uuid4

from limits.aio.storage import MemoryStorage, SlidingWindowCounterSupport

from astra_serve.document.keys import TenantLimits
from astra_serve.gateway.tenancy.quota.standing import DAY, MINUTE, Standing, Window


@dataclass(frozen=True)
class Reservation:
    """What an admitted request has reserved."""

    tenant: str
    tokens: int
    minute: int  # since 1970
    day: int
    id: str = field(default_factory=lambda: uuid4().hex)  # a client may give two requests one id


@dataclass(frozen=True)
class Answer:
    """What a tenant has used, with the request that was asked for if it was admitted."""

    standing: Standing
    reservation: Reservation | None  # None: refused


class Store(Protocol):
    """Counters by tenant."""

    async def reserve(self, tenant: str, limits: TenantLimits, tokens: int) -> Answer:
        """Admit a request of at most so many tokens if no limit is exceeded by it, in one step for all limits.

        Only the requests per minute are counted in a step before, and count a request that another limit refuses.
        """
        ...

    async def settle(self, reservation: Reservation, used: int) -> None:
        """End a request that has used so many tokens; one that has been ended before is not there any more."""
        ...


async def count_request(storage: SlidingWindowCounterSupport, key: str, limit: int) -> bool:
    """Count a request, unless it exceeds the limit per minute; return whether it was counted.

    The key is the tenant's alone (the strategies of `limits` add the limit), so that a changed limit goes on counting.
    """
    return await storage.acquire_sliding_window_entry(key, limit, MINUTE // 1000)


async def requests_of(storage: SlidingWindowCounterSupport, key: str) -> Window:
    """Return the requests of the sliding minute."""
    previous, previous_left, current, current_left = await storage.get_sliding_window(key, MINUTE // 1000)
    current_left -= MINUTE / 1000  # a counter is kept for two minutes
    left = round(1000 * (current_left if current_left > 0 else previous_left))
    return Window(previous, current, min(MINUTE, left))


class MemoryStore:
    """The counters of this process alone."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        """`now` returns the seconds since 1970; requests per minute are counted by the computer's clock."""
        self._now = now
        self._used: defaultdict[str, _Used] = defaultdict(_Used)
        # One for each tenant: at each request a storage looks through all counters for those that have ended.
        self._requests: defaultdict[str, MemoryStorage] = defaultdict(MemoryStorage)

    async def reserve(self, tenant: str, limits: TenantLimits, tokens: int) -> Answer:
        """Admit a request if no limit is exceeded by it."""
        requests, fits = Window(0, 0, 0), True
        if limits.requests_per_minute is not None:
            fits = await count_request(self._requests[tenant], tenant, limits.requests_per_minute)
            requests = await requests_of(self._requests[tenant], tenant)
        used, now = self._used[tenant], int(self._now() * 1000)
        used.roll(now)
        standing = replace(used.standing(now), requests=requests, requests_fit=fits)
        if standing.refusal(limits, tokens):
            return Answer(standing, None)
        reservation = Reservation(tenant, tokens, used.minute, used.day)
        used.add(tokens)
        used.running.add(reservation.id)
        return Answer(replace(used.standing(now), requests=requests), reservation)

    async def settle(self, reservation: Reservation, used: int) -> None:
        """End a request that has used so many tokens."""
        found = self._used[reservation.tenant]
        if reservation.id not in found.running:
            return
        found.running.discard(reservation.id)
        found.roll(int(self._now() * 1000))
        more = used - reservation.tokens
        if more > 0:
            found.add(more)
        else:
            found.give_back(-more, reservation)


@dataclass
class _Used:
    """The counters of one tenant; `redis_store` has the same in a script."""

    minute: int = 0
    previous: int = 0
    current: int = 0
    day: int = 0
    today: int = 0
    running: set[str] = field(default_factory=set)

    def roll(self, now: int) -> None:
        """Begin the minute and the day that it is; a clock that was set back begins with nothing."""
        minute, day = now // MINUTE, now // DAY
        if minute != self.minute:
            self.previous, self.current = self.current if minute == self.minute + 1 else 0, 0
        if day != self.day:
            self.today = 0
        self.minute, self.day = minute, day

    def standing(self, now: int) -> Standing:
        window = Window(self.previous, self.current, MINUTE - now % MINUTE)
        return Standing(window, self.today, DAY - now % DAY, len(self.running))

    def add(self, tokens: int) -> None:
        self.current += tokens
        self.today += tokens

    def give_back(self, tokens: int, reservation: Reservation) -> None:
        """Take tokens from the counters that they were added to, if these still count."""
        if reservation.minute == self.minute:
            self.current = max(0, self.current - tokens)
        elif reservation.minute == self.minute - 1:
            self.previous = max(0, self.previous - tokens)
        if reservation.day == self.day:
            self.today = max(0, self.today - tokens)
