"""The engine's memory: the one loop that executes the decisions of `schedule`, while requests and publications wait.

The engine is never asked for more adapters than it has room for: it would evict one by itself, read it again from disk
in the middle of a step, and die if it could not. It reads a version when this module says so, and at no other time.

A request waits up to `wait_s` (30 s) for its version; a publication waits for its turn without a limit, and `wait_s`
from then on. A load that fails is the version's own failure: its waiters get the reason, later requests get it at once,
and only a new publication tries again.
"""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event, Events
from astra_serve.adapters.loading import Loader
from astra_serve.adapters.schedule import Action, Do, Limits, Place, State, Waiter, decide
from astra_serve.adapters.version import Version
from astra_serve.errors import ProbeFailed, ServeError, Unavailable

# Reason given to requests that outlived the drain deadline; the gateway knows a cancellation by it.
PAST_DEADLINE = "the request was not finished before the deadline of its version, or of the server"


class Residency:
    """The memory of one engine, in which at most `limits.capacity` adapters have a place at a time."""

    def __init__(self, loader: Loader, events: Events, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self._loader, self._events, self._clock = loader, events, clock
        self._places: dict[Version, Place] = {}
        self._in_slots: set[str] = set()
        self._turn_since = 0.0  # when the queue last moved
        self._waiting = 0  # requests and publications
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()  # a new one at each change
        self._settled = asyncio.Event()

    async def run(self) -> None:
        """Execute decisions until cancelled."""
        async with asyncio.TaskGroup() as moves:
            while True:
                self._wake.clear()
                action = decide(self._places.values(), self.limits, self._turn_since, self._clock.now())
                if isinstance(action, Action):
                    self._execute(action, moves)
                    continue
                moving = any(p.state in (State.LOADING, State.PROBING, State.UNLOADING) for p in self._places.values())
                if not moving and not any(place.leaving and place.loaded for place in self._places.values()):
                    self._settled.set()
                await self._clock.wait(self._wake, action.until)

    def place(self, version: Version) -> Place:
        """Return where a version is, to be read."""
        return self._places.get(version) or Place(version)

    def of_alias(self, name: str) -> list[Place]:
        """Return the places of the versions of one adapter."""
        return [place for place in self._places.values() if place.version.alias == name]

    def loaded(self) -> list[Place]:
        """Return the places that are taken."""
        return [place for place in self._places.values() if place.loaded]

    @asynccontextmanager
    async def lease(self, version: Version) -> AsyncIterator[Place]:
        """Keep a version resident for the running task, a request, until the block ends. Raises Unavailable."""
        place, task = self._places.setdefault(version, Place(version)), asyncio.current_task()
        if place.failed is not None:
            raise Unavailable(f"{version.name} cannot be served: {place.failed}")
        if place.state is State.MARKED and place.leaving:  # an operator unloads it: its requests come first
            self._unmark(place)
        if place.state is State.RESIDENT:
            place.leases.add(task)
        else:
            await self._wait(place, Waiter(self._clock.now(), lease=task))
        place.last_used = self._clock.now()
        try:
            yield place
        finally:
            self._release(place, task)

    @asynccontextmanager
    async def hold(self, version: Version, *, allow_no_effect: bool = False) -> AsyncIterator[Place]:
        """Keep a version resident, proved, for a publication until the block ends; it stays if an alias serves it then.

        What failed before is tried again. Raises Unavailable.
        """
        place = self._keep(version)
        place.failed, place.allow_no_effect = None, allow_no_effect
        try:
            if place.loaded:
                place.holds += 1
            else:
                await self._wait(place, Waiter(self._clock.now(), publication=True))
            try:
                yield place
            finally:
                place.holds -= 1
        finally:
            if not (place.served or place.holds):
                self._leave(place)
            self._notify()

    def serve(self, version: Version, *, pinned: bool) -> None:
        """Keep a version in the engine as long as no other one needs its place; a pinned one whatever happens."""
        place = self._keep(version)
        place.served, place.pinned = True, pinned
        self._notify()

    def retire(self, version: Version, drain_s: float) -> None:
        """Evict a version as soon as it is idle; the requests that use it now have `drain_s` seconds to end."""
        if place := self._places.get(version):
            place.served = place.pinned = False
            place.replaced = place.leases | {waiter.lease for waiter in place.waiters}
            place.drain_until = self._clock.now() + drain_s
            self._leave(place)
            self._notify()

    async def unload(self, version: Version) -> None:
        """Evict a version when its leases have ended, unless a new request needs it before; return when that is so.

        The next request loads it again.
        """
        place = self.place(version)
        if place.state is State.RESIDENT:
            place.state, place.leaving = State.MARKED, True
            self._notify()
            while (place.leaving and place.loaded) or place.state is State.UNLOADING:
                await self._changed.wait()

    async def settled(self) -> None:
        """Wait until nothing is loaded, evicted or waits for its last lease."""
        self._notify()
        await self._settled.wait()

    async def look(self) -> None:
        """Ask the engine which adapters have a slot of its batches now, for `where`. Raises ServeError."""
        self._in_slots = await self._loader.in_slots()

    def where(self, version: Version) -> str:
        """Return where a version is.

        slot: in one of the slots of the engine's batches, on its device; memory: in the engine, ready for a slot; disk:
        in the store; absent: nowhere.
        """
        if self.place(version).loaded:
            return "slot" if version.name in self._in_slots else "memory"
        return "disk" if self._loader.stored(version) else "absent"

    def forget(self, keep: Collection[Version]) -> None:
        """Drop the proofs and failures of versions that are not in the engine, and not among those to `keep`."""
        for version, place in list(self._places.items()):
            if place.state is State.ABSENT and not place.served and version not in keep:
                del self._places[version]

    async def _wait(self, place: Place, waiter: Waiter) -> None:
        waiter.done = asyncio.get_running_loop().create_future()
        self._waiting += 1
        place.waiters.append(waiter)
        if place.state is State.ABSENT:
            place.state = State.WAITING
        self._notify()
        try:
            await waiter.done
        except BaseException:
            if waiter in place.waiters:
                self._drop(place, [waiter])
            elif not waiter.done.cancelled() and not waiter.done.exception():  # cancelled after it was granted
                place.holds -= waiter.publication
                self._release(place, waiter.lease)
            raise
        finally:
            self._waiting -= 1

    def _release(self, place: Place, lease: Any) -> None:
        place.leases.discard(lease)
        if self._waiting or place.leaving:  # otherwise no decision depends on it: most requests wake no loop
            self._notify()

    def _drop(self, place: Place, waiters: Collection[Waiter]) -> None:
        place.waiters = [waiter for waiter in place.waiters if waiter not in waiters]
        if place.state is State.WAITING and not place.waiters:
            place.state, self._turn_since = State.ABSENT, self._clock.now()
        self._notify()

    def _keep(self, version: Version) -> Place:
        """Return the place of a version that is needed again: neither it nor its requests are ended."""
        place = self._places.setdefault(version, Place(version))
        place.leaving, place.replaced = False, set()
        return place

    @staticmethod
    def _leave(place: Place) -> None:
        place.leaving = place.state is not State.ABSENT  # the next load begins anew

    def _notify(self) -> None:
        self._settled.clear()
        self._wake.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _execute(self, action: Action, moves: asyncio.TaskGroup) -> None:
        place = action.place
        match action.do:
            case Do.LOAD:
                place.state, self._turn_since = State.LOADING, self._clock.now()
                moves.create_task(self._load(place))
            case Do.EVICT:
                place.state, place.leaving = State.UNLOADING, False
                moves.create_task(self._unload(place))
            case Do.MARK:
                place.state, place.since = State.MARKED, self._clock.now()
            case Do.UNMARK:
                self._unmark(place)
            case Do.REFUSE:
                self._drop(place, action.waiters)
                _reject(action.waiters, _no_place(place.version))
            case Do.CANCEL:
                for task in place.replaced & place.leases:
                    task.cancel(PAST_DEADLINE)  # as if the client had disconnected: the engine aborts its work for it
                place.replaced = set()
        self._notify()

    def _unmark(self, place: Place) -> None:
        place.state, place.leaving, place.since = State.RESIDENT, False, self._clock.now()
        self._grant(place)
        self._notify()

    def _grant(self, place: Place) -> None:
        """Give the waiters their leases and holds."""
        waiters, place.waiters = place.waiters, []
        for waiter in waiters:
            assert waiter.done is not None
            if waiter.done.done():  # cancelled a moment ago
                continue
            if waiter.publication:
                place.holds += 1
            else:
                place.leases.add(waiter.lease)
            waiter.done.set_result(None)

    async def _load(self, place: Place) -> None:
        version = place.version
        try:
            seconds = await self._loader.load(place)
        except Exception as error:  # of the version's files, its weights or the engine: its own failure in any case
            place.failed = str(error) or type(error).__name__
            event = "probe_failed" if isinstance(error, ProbeFailed) else "load_failed"
            self._events.emit(Event(version.alias, event, version.name, place.failed))
            failure = Unavailable(f"{version.name} cannot be served: {place.failed}")
            failure.__cause__ = error
            if place.handle is not None:
                await self._unload(place)
            waiters, place.waiters, place.state = place.waiters, [], State.ABSENT
            _reject(waiters, failure)
        else:
            now = self._clock.now()
            place.state, place.since, place.last_used, place.seconds = State.RESIDENT, now, now, seconds
            self._grant(place)
            self._events.emit(Event(version.alias, "loaded", version.name, seconds=seconds))
        self._notify()

    async def _unload(self, place: Place) -> None:
        handle, place.handle = place.handle, None
        try:
            await self._loader.unload(handle)
        except ServeError as error:  # the engine still holds it: its room is lost
            place.failed = str(error)
            self.limits = replace(self.limits, capacity=max(1, self.limits.capacity - 1))
        place.state = State.WAITING if place.waiters else State.ABSENT
        self._events.emit(Event(place.version.alias, "unloaded", place.version.name))
        self._notify()


def _reject(waiters: Collection[Waiter], error: Exception) -> None:
    for waiter in waiters:
        if waiter.done is not None and not waiter.done.done():
            waiter.done.set_exception(error)


def _no_place(version: Version) -> Unavailable:
    reason = "waits for a place in the engine, where all adapters are in use or pinned: try again"
    return Unavailable(f"{version.name} {reason}, or give the server more --resident", retry_after_s=5)
