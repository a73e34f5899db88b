"""Which versions are loaded, and which one is evicted to make room: one pure decision at a time.

    ABSENT -> WAITING -> LOADING -> PROBING -> RESIDENT <-> MARKED -> UNLOADING -> ABSENT
                (no place)   (has one of `capacity` places)              (its place is free already)

WAITING versions form a queue by the time of their oldest waiter. The first of the queue gets a free place, or the place
of an idle version: resident, without a lease and without a hold. Of several idle versions the least recently used is
evicted first. A pinned version that its alias serves is never evicted.

Where no version is idle for `patience_s`, the version that has been resident for the longest time is marked for
eviction: its new requests wait, and it is evicted when its last lease ends. If that takes longer than `mark_s` (one
long stream), the mark is removed and another version is marked. Where nothing helps, a request is refused `wait_s`
after it began to wait, and a publication `wait_s` after its turn came.

A version that is replaced, removed, or unloaded by an operator is evicted as soon as it is idle; its leases are
cancelled at the deadline of its replacement.
"""

import asyncio
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from astra_serve.adapters.probe import Proof
from astra_serve.adapters.version import Version

HEADROOM = 4  # adapters that the engine has room for beyond `capacity`: a load need not wait for an eviction to end


class State(StrEnum):
    """Where a version is on its way into the engine's memory and out of it."""

    ABSENT = "absent"
    WAITING = "waiting"  # for a place
    LOADING = "loading"  # the engine reads it
    PROBING = "probing"  # the engine answers the prompts of its probe
    RESIDENT = "resident"  # ready for requests
    MARKED = "marked"  # for eviction: no new leases
    UNLOADING = "unloading"


@dataclass(frozen=True)
class Limits:
    """The time limits, in seconds, and the number of places."""

    capacity: int
    wait_s: float = 30.0  # for a place
    patience_s: float = 1.0  # with versions that are all in use, before one is marked
    mark_s: float = 10.0  # for the last lease of a marked version


@dataclass(eq=False)
class Waiter:
    """A request or a publication that waits until a version is resident."""

    since: float
    publication: bool = False
    lease: Any = None  # the request's task
    done: "asyncio.Future[None] | None" = None  # set by the loop

    def deadline(self, limits: Limits) -> float:
        """Return when a request is refused; a publication's time begins with its turn."""
        return math.inf if self.publication else self.since + limits.wait_s


@dataclass(eq=False)
class Place:
    """One version, where it is, and which requests and publications need it there."""

    version: Version
    state: State = State.ABSENT
    since: float = 0.0  # when it became resident, or was marked
    last_used: float = 0.0  # by a request, or when it became resident
    leases: set[Any] = field(default_factory=set)  # tasks of requests that the engine may be computing for
    holds: int = 0  # publications that keep it in the engine
    waiters: list[Waiter] = field(default_factory=list)
    served: bool = False  # an alias points at it: current or canary
    pinned: bool = False
    leaving: bool = False  # evicted as soon as it is idle
    replaced: set[Any] = field(default_factory=set)  # the leases that there were when it was replaced
    drain_until: float = math.inf  # when those of them that are left are cancelled
    handle: Any = None  # the engine's, from RESIDENT on
    proof: Proof | None = None
    adapts_head: bool = False
    allow_no_effect: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # the duration of the parts of its last load
    failed: str | None = None  # why it cannot be served; a new publication tries again

    @property
    def loaded(self) -> bool:
        """Return whether the engine has it, proved."""
        return self.state in (State.RESIDENT, State.MARKED)

    @property
    def evictable(self) -> bool:
        """Return whether it may be marked, and evicted when its leases have ended."""
        return self.loaded and not self.holds and not (self.pinned and self.served)

    @property
    def for_publication(self) -> bool:
        """Return whether publications alone wait for it."""
        return all(waiter.publication for waiter in self.waiters)


class Do(StrEnum):
    """An action of the loop that executes decisions."""

    LOAD = "load"  # give it a place, let the engine read it
    EVICT = "evict"  # take its place away, let the engine forget it
    MARK = "mark"  # no new request uses it
    UNMARK = "unmark"  # requests use it again
    REFUSE = "refuse"  # some of its waiters: there is no place
    CANCEL = "cancel"  # the leases that outlived the deadline


@dataclass(frozen=True)
class Action:
    """The next thing to do, and the version that it concerns."""

    do: Do
    place: Place
    waiters: tuple[Waiter, ...] = ()


@dataclass(frozen=True)
class Wait:
    """Nothing can be done before something changes, or before this time."""

    until: float


def decide(places: Collection[Place], limits: Limits, turn_since: float, now: float) -> Action | Wait:
    """Return the next action. `turn_since` is when the queue last moved; times are of the server's clock."""
    for place in places:
        if place.replaced & place.leases and place.drain_until <= now:
            return Action(Do.CANCEL, place)
        if late := tuple(waiter for waiter in place.waiters if waiter.deadline(limits) <= now):
            return Action(Do.REFUSE, place, late)
        if place.state is State.MARKED and not (place.evictable or place.leaving):
            return Action(Do.UNMARK, place)
    can_evict = sum(place.state is State.UNLOADING for place in places) < HEADROOM
    if can_evict:
        for place in places:
            if place.leaving and place.loaded and not (place.leases or place.holds):
                return Action(Do.EVICT, place)
    dates = [place.drain_until for place in places if place.replaced & place.leases]
    dates += [waiter.deadline(limits) for place in places for waiter in place.waiters]
    for_first = _for_the_first(places, limits, turn_since, now, can_evict=can_evict)
    if isinstance(for_first, Wait):
        return Wait(min([for_first.until, *dates]))
    return for_first


def _for_the_first(
    places: Collection[Place], limits: Limits, turn_since: float, now: float, *, can_evict: bool
) -> Action | Wait:
    """Return the next action for the first version of the queue."""
    marked = [place for place in places if place.state is State.MARKED]
    to_unmark = [place for place in marked if not place.leaving]
    loading = [place for place in places if place.state in (State.LOADING, State.PROBING)]
    # The last of the places that load at a time is for requests: these do not wait for the probes of publications.
    for_publications = sum(place.for_publication for place in loading) < HEADROOM - 1
    queue = sorted(
        (place for place in places if place.state is State.WAITING and (for_publications or not place.for_publication)),
        key=lambda place: place.waiters[0].since,
    )
    if not queue:
        return Action(Do.UNMARK, to_unmark[0]) if to_unmark else Wait(math.inf)
    if len(loading) >= HEADROOM:
        return Wait(math.inf)
    first = queue[0]
    if sum(place.loaded for place in places) + len(loading) < limits.capacity:
        return Action(Do.LOAD, first)
    evictable = [place for place in places if place.evictable]
    if idle := [place for place in evictable if not place.leases]:
        oldest = min(idle, key=lambda place: place.last_used)
        return Action(Do.EVICT, oldest) if can_evict else Wait(math.inf)
    turn = max(first.waiters[0].since, turn_since)
    if first.for_publication and now >= turn + limits.wait_s:
        return Action(Do.REFUSE, first, tuple(first.waiters))
    for place in to_unmark:
        if now >= place.since + limits.mark_s:
            return Action(Do.UNMARK, place)
    ends = [place.since + limits.mark_s for place in marked if now < place.since + limits.mark_s]
    to_mark = [place for place in evictable if place.state is State.RESIDENT]
    if to_mark and not ends and now >= turn + limits.patience_s:
        return Action(Do.MARK, min(to_mark, key=lambda place: place.since))
    dates = ends or ([turn + limits.patience_s] if to_mark else [])
    return Wait(min([*dates, turn + limits.wait_s if first.for_publication else math.inf]))
