"""Which versions are in the engine's memory: one pure decision at a time.

At most `capacity` versions are in memory, that is, LOADING, PROBING, RESIDENT or MARKED:

    ABSENT -> WAITING -> LOADING -> PROBING -> RESIDENT -> UNLOADING -> ABSENT (or WAITING, if it is needed again)
                                                |    ^         ^
                                                v    |         |
                                                MARKED --------+
    WAITING -> ABSENT                all its waiters were refused, or gave up
    LOADING, PROBING -> ABSENT       the load or the probe failed

WAITING versions form a queue, and only its head is served: of those that requests wait for, a version of the tenant
that has the fewest versions in memory for its weight; among equals, and among these and the publications, the version
with the oldest waiter. A version in memory counts for each tenant that uses it or waits for it now, otherwise for the
one that used it last; pinned ones count, too. Where there is one tenant, the oldest waiter is first. Up to four
versions load at a time. At most three of these loads are for publications alone: while there are three, versions that a
request needs go first, so that requests do not queue behind publications.

The head is loaded if memory is free, and otherwise takes the memory of an idle version: resident, without a lease and
without a hold. Of several idle versions one is evicted of the tenant that has most versions in memory for its weight,
together with those that no tenant has used; of these the least recently used one: the one whose last lease ended
earliest (or whose load ended earliest, if it has had no lease since). A version that several tenants use is evicted as
one of the tenant that has fewest. A version that is pinned while an alias serves it is never evicted.

When the head of the queue has waited `patience_s` and no version is idle, a version of the tenant that has most is
marked, by the same rule, and of these the version that has been resident for the longest time: its new requests wait,
and it is evicted when its last lease ends. The mark ends when no version waits any more. If the lease takes longer than
`mark_s` (one long stream), the version is resident again as if it had just been loaded, so that another version is
marked next; the only candidate is marked again at once.

A request is refused `wait_s` after it arrived, whether its version then waits, loads or is probed. A publication is
refused when its version is the head, no version can be evicted for it, and `wait_s` has passed both since its oldest
waiter came and since any version last left the queue; `patience_s` counts in the same way. It is not refused while four
versions load. If every version in memory is pinned, all other versions are refused after `wait_s`.

A version that is replaced, removed, or unloaded by an operator is evicted as soon as it is idle. The leases of a
version that is replaced or removed get a deadline, and are cancelled then. A deadline is set once: later changes of the
adapter do not move it, but it ends when the version is served again, as after a rollback. A lease of an older version
of the rollback history begins without a deadline, and gets one when the version leaves the history.
"""

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from astra_serve.adapters.defaults import Defaults
from astra_serve.adapters.probe import Proof
from astra_serve.adapters.version import Version

MOST_LOADS = 4  # at a time; at most three of them for publications alone
HEADROOM = 4  # adapters that the engine has room for beyond `capacity`: as many unload while others load


class State(StrEnum):
    """Where a version is on its way into the engine's memory and out of it."""

    ABSENT = "absent"
    WAITING = "waiting"  # until memory is free
    LOADING = "loading"  # the engine reads it
    PROBING = "probing"  # the engine answers the prompts of its probe
    RESIDENT = "resident"  # ready for requests
    MARKED = "marked"  # for eviction: no new leases
    UNLOADING = "unloading"  # its memory counts as free already


@dataclass(frozen=True)
class Limits:
    """How many versions are in memory at most, and the time limits in seconds."""

    capacity: int
    wait_s: float = 30.0  # of a request until its lease begins; of a publication at the head of the queue
    patience_s: float = 1.0  # with versions that are all in use, before one is marked
    mark_s: float = 10.0  # for the last lease of a marked version


@dataclass(frozen=True)
class Owner:
    """The tenant of a request; two tenants with weights 1 and 2 have a fair share of the memory at 1 : 2 versions."""

    name: str = ""
    weight: float = 1.0


@dataclass(eq=False)
class Waiter:
    """A request or a publication that waits until a version is resident."""

    since: float
    publication: bool = False
    lease: Any = None  # the request's task
    done: "asyncio.Future[None] | None" = None  # set by the loop
    owner: Owner | None = None  # None: a publication

    def deadline(self, limits: Limits) -> float:
        """Return when a request is refused; that of a publication depends on the queue."""
        return math.inf if self.publication else self.since + limits.wait_s


@dataclass(eq=False)
class Residence:
    """One version, its state in the engine's memory, and which requests and publications need it there.

    `Residency` and `Loader` alone write it.
    """

    version: Version
    state: State = State.ABSENT
    resident_since: float = 0.0
    marked_since: float = 0.0
    last_used: float = 0.0  # when its last lease ended, or when it became resident
    leases: set[Any] = field(default_factory=set)  # tasks of requests that the engine may be computing for
    owners: dict[Any, Owner] = field(default_factory=dict)  # of the leases
    last_owner: Owner | None = None  # of the lease that ended last
    holds: int = 0  # publications that keep it in the engine
    waiters: list[Waiter] = field(default_factory=list)  # oldest first
    serving: bool = False  # it is the current version of its alias, or the canary
    pinned: bool = False
    leaving: bool = False  # evicted as soon as it is idle
    deadlines: dict[Any, float] = field(default_factory=dict)  # of leases and waiters since their version was replaced
    handle: Any = None  # the engine's, from PROBING on
    proof: Proof | None = None
    adapts_head: bool = False
    defaults: Defaults = field(default_factory=Defaults)  # of the requests for it
    allow_no_effect: bool = False
    urgent: bool = False  # a publication that is proved as soon as requests are answered, not behind them
    seconds: dict[str, float] = field(default_factory=dict)  # the duration of the parts of its last load
    failed: str | None = None  # why it cannot be served; a publication or the reconciler tries again

    @property
    def loaded(self) -> bool:
        """Return whether the engine has it, proved."""
        return self.state in (State.RESIDENT, State.MARKED)

    @property
    def evictable(self) -> bool:
        """Return whether it may be marked, and evicted when its leases have ended."""
        return self.loaded and not self.holds and not (self.pinned and self.serving)

    @property
    def for_publication(self) -> bool:
        """Return whether publications alone wait for it."""
        return all(waiter.publication for waiter in self.waiters)

    @property
    def tenants(self) -> set[Owner]:
        """Return the tenants that it counts for."""
        now = {*self.owners.values(), *self.waiting_tenants}
        return now or ({self.last_owner} if self.last_owner else set())

    @property
    def waiting_tenants(self) -> set[Owner]:
        """Return the tenants whose requests wait for it; none where publications alone do."""
        return {waiter.owner for waiter in self.waiters if waiter.owner}

    @property
    def drain_until(self) -> float:
        """Return the earliest deadline of its leases; infinity where no lease has one."""
        return min((self.deadlines[lease] for lease in self.deadlines.keys() & self.leases), default=math.inf)


class Do(StrEnum):
    """An action of the loop that executes decisions."""

    LOAD = "load"  # let the engine read it
    EVICT = "evict"  # let the engine forget it
    MARK = "mark"  # no new request uses it
    UNMARK = "unmark"  # requests use it again
    REFUSE = "refuse"  # some of its waiters: their time is up
    CANCEL = "cancel"  # the leases that outlived the deadline


@dataclass(frozen=True)
class Action:
    """The next thing to do, and the version that it concerns."""

    do: Do
    residence: Residence
    waiters: tuple[Waiter, ...] = ()


@dataclass(frozen=True)
class Wait:
    """Nothing can be done before something changes, or before this time."""

    until: float


def decide(residences: Collection[Residence], limits: Limits, head_since: float, now: float) -> Action | Wait:
    """Return the next action.

    `head_since` is when a version last left the queue, as its head or not: the waits of the head count from then at the
    earliest. Times are of the server's clock.
    """
    for one in residences:
        if one.drain_until <= now:
            return Action(Do.CANCEL, one)
        if late := tuple(waiter for waiter in one.waiters if waiter.deadline(limits) <= now):
            return Action(Do.REFUSE, one, late)
        if one.state is State.MARKED and not (one.evictable or one.leaving):
            return Action(Do.UNMARK, one)
    can_evict = sum(one.state is State.UNLOADING for one in residences) < HEADROOM
    if can_evict:
        for one in residences:
            if one.leaving and one.loaded and not (one.leases or one.holds):
                return Action(Do.EVICT, one)
    for_head = _for_the_head(residences, limits, head_since, now, can_evict=can_evict)
    if isinstance(for_head, Action):
        return for_head
    dates = [one.drain_until for one in residences]
    dates += [waiter.deadline(limits) for one in residences for waiter in one.waiters]
    return Wait(min([for_head.until, *dates]))


def _for_the_head(
    residences: Collection[Residence], limits: Limits, head_since: float, now: float, *, can_evict: bool
) -> Action | Wait:
    """Return the next action for the head of the queue."""
    marked = [one for one in residences if one.state is State.MARKED]
    to_unmark = [one for one in marked if not one.leaving]
    loading = [one for one in residences if one.state in (State.LOADING, State.PROBING)]
    for_publications = sum(one.for_publication for one in loading) < MOST_LOADS - 1
    queue = [one for one in residences if one.state is State.WAITING and (for_publications or not one.for_publication)]
    if not queue:
        return Action(Do.UNMARK, to_unmark[0]) if to_unmark else Wait(math.inf)
    if len(loading) >= MOST_LOADS:
        return Wait(math.inf)
    held = _held(residences)
    least = min(_share(one.waiting_tenants, held, math.inf) for one in queue)
    head = min(queue, key=lambda one: (_share(one.waiting_tenants, held, least), one.waiters[0].since))
    if sum(one.loaded for one in residences) + len(loading) < limits.capacity:
        return Action(Do.LOAD, head)
    evictable = [one for one in residences if one.evictable]
    most = max(held.values(), default=0.0)
    if idle := [one for one in evictable if not one.leases]:
        oldest = min(idle, key=lambda one: (-_share(one.tenants, held, most), one.last_used))
        return Action(Do.EVICT, oldest) if can_evict else Wait(math.inf)
    began = max(head.waiters[0].since, head_since)
    if head.for_publication and now >= began + limits.wait_s:
        return Action(Do.REFUSE, head, tuple(head.waiters))
    for one in to_unmark:
        if now >= one.marked_since + limits.mark_s:
            return Action(Do.UNMARK, one)
    ends = [one.marked_since + limits.mark_s for one in marked if now < one.marked_since + limits.mark_s]
    to_mark = [one for one in evictable if one.state is State.RESIDENT]
    if to_mark and not ends and now >= began + limits.patience_s:
        return Action(Do.MARK, min(to_mark, key=lambda one: (-_share(one.tenants, held, most), one.resident_since)))
    dates = ends or ([began + limits.patience_s] if to_mark else [])
    return Wait(min([*dates, began + limits.wait_s if head.for_publication else math.inf]))


def _held(residences: Collection[Residence]) -> dict[str, float]:
    """Return the versions in memory of each tenant, by its name, divided by its weight."""
    held: dict[str, float] = {}
    for one in residences:
        if one.loaded or one.state in (State.LOADING, State.PROBING):
            for owner in one.tenants:
                held[owner.name] = held.get(owner.name, 0.0) + 1 / owner.weight
    return held


def _share(tenants: Collection[Owner], held: dict[str, float], of_none: float) -> float:
    """Return what the tenant of a version has in memory; of several tenants the one that has least."""
    return min((held.get(owner.name, 0.0) for owner in tenants), default=of_none)
