"""The engine's memory: the one loop that executes the decisions of `schedule`, while requests and publications wait.

The engine is never asked for more adapters than it has room for: the engine would evict an adapter itself, read it from
disk during a step, and die if the read failed. The engine reads a version only when this module asks for it.

`schedule` says how long requests and publications wait. A load that fails is the version's own failure: its waiters get
the reason, later requests get it at once, and only a publication or the reconciler tries again. An engine that is
silent for `--engine-timeout`, such as in a load that hangs, is lost: the server ends. So it does at an exception of the
loop.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event, Events
from astra_serve.adapters.loading import Loader
from astra_serve.adapters.schedule import Action, Do, Limits, Owner, Residence, State, Waiter, decide
from astra_serve.adapters.version import Version
from astra_serve.errors import ProbeFailed, ServeError, Unavailable

NO_TENANT = Owner()
MOVING = (State.LOADING, State.PROBING, State.UNLOADING)
# Reason given to requests that outlived the drain deadline; the gateway knows a cancellation by it.
PAST_DEADLINE = "the request was not finished before the deadline of its version, or of the server"


class Residency:
    """The memory of one engine, which holds at most `limits.capacity` versions that are ready for requests."""

    def __init__(self, loader: Loader, events: Events, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self._loader, self._events, self._clock = loader, events, clock
        self._residences: dict[Version, Residence] = {}
        self._in_slots: set[str] = set()
        self._head_since = 0.0  # when a version last left the queue
        self._waiting = 0  # requests and publications
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()  # a new one at each change
        self._idle = asyncio.Event()

    async def run(self) -> None:
        """Execute decisions until cancelled."""
        async with asyncio.TaskGroup() as moves:
            while True:
                self._wake.clear()
                action = decide(self._residences.values(), self.limits, self._head_since, self._clock.now())
                if isinstance(action, Action):
                    self._execute(action, moves)
                    continue
                if not any(one.state in MOVING or (one.leaving and one.loaded) for one in self._residences.values()):
                    self._idle.set()
                await self._clock.wait(self._wake, action.until)

    def of(self, version: Version) -> Residence:
        """Return the residence of a version, to be read."""
        return self._residences.get(version) or Residence(version)

    def of_alias(self, name: str) -> list[Residence]:
        """Return the residences of the versions of one adapter."""
        return [one for one in self._residences.values() if one.version.alias == name]

    def loaded(self) -> list[Residence]:
        """Return the residences of the versions that the engine has, proved."""
        return [one for one in self._residences.values() if one.loaded]

    @asynccontextmanager
    async def lease(self, version: Version, owner: Owner = NO_TENANT) -> AsyncIterator[Residence]:
        """Keep a version resident for the running task, a request, until the block ends. Raises Unavailable."""
        residence, task = self._residences.setdefault(version, Residence(version)), asyncio.current_task()
        if residence.failed is not None:
            raise Unavailable(f"{version.name} cannot be served: {residence.failed}")
        if residence.state is State.MARKED and residence.leaving:  # an operator unloads it: its requests come first
            self._unmark(residence)
        if residence.state is State.RESIDENT:
            residence.leases.add(task)
            residence.owners[task] = owner
        else:
            await self._wait(residence, Waiter(self._clock.now(), lease=task, owner=owner))
        try:
            yield residence
        finally:
            self._release(residence, task)

    @asynccontextmanager
    async def hold(
        self, version: Version, *, allow_no_effect: bool = False, urgent: bool = False
    ) -> AsyncIterator[Residence]:
        """Keep a version resident, proved, for a publication until the block ends; it stays if an alias serves it then.

        What failed before is tried again. The probe of an `urgent` one is computed like a user's request, otherwise
        behind them. Raises Unavailable.
        """
        residence = self._needed_again(version)
        residence.failed, residence.allow_no_effect, residence.urgent = None, allow_no_effect, urgent
        try:
            if residence.loaded:
                residence.holds += 1
            else:
                await self._wait(residence, Waiter(self._clock.now(), publication=True))
            try:
                yield residence
            finally:
                residence.holds -= 1
        finally:
            if not (residence.serving or residence.holds):
                self._leave(residence)
            self._notify()

    def keep(self, version: Version, *, pinned: bool) -> None:
        """Keep a version in the engine as long as no other one needs the memory; a pinned one whatever happens.

        The deadlines of its requests end.
        """
        residence = self._needed_again(version)
        residence.serving, residence.pinned, residence.deadlines = True, pinned, {}
        self._notify()

    def retire(self, version: Version, drain_s: float) -> None:
        """Evict a version as soon as it is idle; its requests without a deadline have `drain_s` seconds to end."""
        if residence := self._residences.get(version):
            residence.serving = residence.pinned = False
            deadline = self._clock.now() + drain_s
            requests = residence.leases | {waiter.lease for waiter in residence.waiters}
            residence.deadlines = {one: residence.deadlines.get(one, deadline) for one in requests}
            self._leave(residence)
            self._notify()

    async def unload(self, version: Version) -> None:
        """Mark a resident version; return when it is evicted, or the mark is removed. In any other state do nothing.

        It is evicted when its leases have ended. A new request or a publication removes the mark.
        """
        residence = self.of(version)
        if residence.state is State.RESIDENT:
            residence.state, residence.leaving = State.MARKED, True
            self._notify()
            while (residence.leaving and residence.loaded) or residence.state is State.UNLOADING:
                await self._changed.wait()

    async def idle(self) -> None:
        """Wait until no load, no eviction and no drain is in progress."""
        self._notify()
        await self._idle.wait()

    async def look(self) -> None:
        """Ask the engine which adapters have a slot of its batches now, for `where`. Raises ServeError."""
        self._in_slots = await self._loader.in_slots()

    def where(self, version: Version) -> str:
        """Return where a version is.

        slot: in one of the slots of the engine's batches, on its device; memory: in the engine, ready for a slot; disk:
        in the store; absent: nowhere.
        """
        if self.of(version).loaded:
            return "slot" if version.name in self._in_slots else "memory"
        return "disk" if self._loader.stored(version) else "absent"

    def forget(self, keep: Collection[Version]) -> None:
        """Drop the proofs and failures of versions that are not in the engine, and not among those to `keep`."""
        for version, residence in list(self._residences.items()):
            if residence.state is State.ABSENT and not residence.serving and version not in keep:
                del self._residences[version]

    async def _wait(self, residence: Residence, waiter: Waiter) -> None:
        waiter.done = asyncio.get_running_loop().create_future()
        self._waiting += 1
        residence.waiters.append(waiter)
        if residence.state is State.ABSENT:
            residence.state = State.WAITING
        self._notify()
        try:
            await waiter.done
        except BaseException:
            if waiter in residence.waiters:
                self._drop(residence, [waiter])
            elif not waiter.done.cancelled() and not waiter.done.exception():  # cancelled after it was granted
                residence.holds -= waiter.publication
                self._release(residence, waiter.lease)
            raise
        finally:
            self._waiting -= 1

    def _release(self, residence: Residence, lease: Any) -> None:
        residence.leases.discard(lease)
        residence.deadlines.pop(lease, None)
        residence.last_owner = residence.owners.pop(lease, residence.last_owner)
        residence.last_used = self._clock.now()
        if self._waiting or residence.leaving:  # otherwise no decision depends on it: most requests wake no loop
            self._notify()

    def _drop(self, residence: Residence, waiters: Collection[Waiter]) -> None:
        residence.waiters = [waiter for waiter in residence.waiters if waiter not in waiters]
        if residence.state is State.WAITING and not residence.waiters:
            residence.state, self._head_since = State.ABSENT, self._clock.now()
        self._notify()

    def _needed_again(self, version: Version) -> Residence:
        """Return the residence of a version that is needed again: it stays."""
        residence = self._residences.setdefault(version, Residence(version))
        residence.leaving = False
        return residence

    @staticmethod
    def _leave(residence: Residence) -> None:
        residence.leaving = residence.state is not State.ABSENT  # the next load begins anew

    def _notify(self) -> None:
        self._idle.clear()
        self._wake.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _execute(self, action: Action, moves: asyncio.TaskGroup) -> None:
        residence = action.residence
        match action.do:
            case Do.LOAD:
                residence.state, self._head_since = State.LOADING, self._clock.now()
                moves.create_task(self._load(residence))
            case Do.EVICT:
                residence.state, residence.leaving = State.UNLOADING, False
                moves.create_task(self._unload(residence))
            case Do.MARK:
                residence.state, residence.marked_since = State.MARKED, self._clock.now()
            case Do.UNMARK:
                self._unmark(residence)
            case Do.REFUSE:
                self._drop(residence, action.waiters)
                _reject(action.waiters, _no_memory(residence.version))
            case Do.CANCEL:
                now = self._clock.now()
                for task in residence.leases:
                    if residence.deadlines.get(task, math.inf) <= now:
                        task.cancel(PAST_DEADLINE)  # as if the client had disconnected: the engine aborts its work
                        residence.deadlines[task] = math.inf  # cancelled once
        self._notify()

    def _unmark(self, residence: Residence) -> None:
        residence.state, residence.leaving, residence.resident_since = State.RESIDENT, False, self._clock.now()
        self._grant(residence)
        self._notify()

    def _grant(self, residence: Residence) -> None:
        """Give the waiters their leases and holds."""
        waiters, residence.waiters = residence.waiters, []
        for waiter in waiters:
            assert waiter.done is not None
            if waiter.done.done():  # cancelled a moment ago
                continue
            if waiter.publication:
                residence.holds += 1
            else:
                residence.leases.add(waiter.lease)
                residence.owners[waiter.lease] = waiter.owner or NO_TENANT
            waiter.done.set_result(None)

    async def _load(self, residence: Residence) -> None:
        version = residence.version
        try:
            seconds = await self._loader.load(residence)
        except Exception as error:  # of the version's files, its weights or the engine: its own failure in any case
            residence.failed = str(error) or type(error).__name__
            event = "probe_failed" if isinstance(error, ProbeFailed) else "load_failed"
            self._events.emit(Event(version.alias, event, version.name, residence.failed))
            failure = Unavailable(f"{version.name} cannot be served: {residence.failed}")
            failure.__cause__ = error
            if residence.handle is not None:
                await self._unload(residence)
            waiters, residence.waiters, residence.state = residence.waiters, [], State.ABSENT
            _reject(waiters, failure)
        else:
            now = self._clock.now()
            residence.state, residence.seconds = State.RESIDENT, seconds
            residence.resident_since = residence.last_used = now
            self._grant(residence)
            self._events.emit(Event(version.alias, "loaded", version.name, seconds=seconds))
        self._notify()

    async def _unload(self, residence: Residence) -> None:
        handle, residence.handle = residence.handle, None
        try:
            await self._loader.unload(handle)
        except ServeError as error:  # the engine still holds it: its memory is lost until a restart
            residence.failed = str(error)
            self.limits = replace(self.limits, capacity=max(1, self.limits.capacity - 1))
        residence.state = State.WAITING if residence.waiters else State.ABSENT
        self._events.emit(Event(residence.version.alias, "unloaded", residence.version.name))
        self._notify()


def _reject(waiters: Collection[Waiter], error: Exception) -> None:
    for waiter in waiters:
        if waiter.done is not None and not waiter.done.done():
            waiter.done.set_exception(error)


def _no_memory(version: Version) -> Unavailable:
    reason = "waits for the engine's memory, where all adapters are in use or pinned: try again"
    return Unavailable(f"{version.name} {reason}, or give the server more --resident", retry_after_s=5)
