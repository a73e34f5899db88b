"""Names, the versions behind them, and who is using which: the only place that decides what a request is served by.

A name is an alias of one version; moving it is one assignment. A request resolves its name once, when it is admitted,
and holds a lease on that version until its last byte. A version leaves the engine when nobody holds it.

The engine is never asked for more adapters than it has room for: it would push one out, read it again from disk in the
middle of a step, and die if it could not. It reads a version when this module says so, and at no other time. What it
reads has the bytes that were published, and was proved on it before its first request.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakValueDictionary

from astra_serve.admission import Base
from astra_serve.errors import ProbeFailed, ServeError, Unavailable
from astra_serve.interface import Engine
from astra_serve.journal import Event, Journal
from astra_serve.probe import Prover
from astra_serve.store import Store
from astra_serve.version import Alias, Version
from converter.adapter_dir import AdapterError

# The message of a cancellation: whose version is replaced, or whose server ends, and who has had time enough.
PAST_DEADLINE = "the request was not finished before the deadline of its version, or of the server"
LEAVE_S = 10.0  # for a version that is asked to make room
HEADROOM = 4  # adapters that the engine has room for beyond the fleet's capacity: they come while others go
SHORTEST_PREFIX = 6  # hex digits by which a request may name a version


class Fleet:
    """The adapters of one engine, of which at most `capacity` are loaded at a time."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        base: Base,
        capacity: int,
        *,
        wait_s: float = 30.0,
        patience_s: float = 1.0,
    ) -> None:
        """`wait_s` is how long a request waits for its version, `patience_s` how long a version for an idle place."""
        self.aliases: dict[str, Alias] = {}
        self.expected: set[str] = set()  # names that are to be served, and may not be yet
        self.journal = Journal()
        self.capacity = capacity
        self.base = base
        self._engine, self._store, self._prover = engine, store, Prover(engine)
        self._wait_s, self._patience_s = wait_s, patience_s
        self._in_slots: set[str] = set()
        self._resident: set[Version] = set()
        self._moving = asyncio.Semaphore(HEADROOM)  # held while an adapter comes or goes
        self._publishing = asyncio.Semaphore(HEADROOM - 1)  # so that requests need not wait for the probes of others
        self._choosing = asyncio.Lock()  # of who makes room; first come, first served
        self._released = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()
        self._versions: WeakValueDictionary[tuple[str, str], Version] = WeakValueDictionary()

    def version(self, alias: str, digest: str) -> Version:
        """Return the version with `digest` under a name: the one there is, unless it failed, otherwise a new one.

        There is never a second: one that is leaving stays, if it is wanted again.
        """
        found = self._versions.get((alias, digest))
        if found is None or found.failed is not None:
            found = self._versions[alias, digest] = Version(alias, digest)
        return found

    def known(self, model: str) -> str | None:
        """Return the name that `model` (`name` or `name@digest-prefix`) is of, if it is one that is to be served."""
        name = model.partition("@")[0]
        return name if name in self.aliases or name in self.expected else None

    def resolve(self, model: str, caller: str = "") -> Version | None:
        """Return the version that `model` (`name` or `name@digest-prefix`) means now; None where nothing is called so.

        With a canary the share of callers is decided by a hash: the same caller gets the same version.
        """
        name, at, prefix = model.partition("@")
        alias = self.aliases.get(name)
        if alias is None:
            return None
        if at:
            found = {v.digest: v for v in alias.versions() if v.digest.removeprefix("sha256:").startswith(prefix)}
            return next(iter(found.values())) if len(found) == 1 and len(prefix) >= SHORTEST_PREFIX else None
        if alias.canary and _share(f"{name}\0{caller}") < alias.weight:
            return alias.canary
        return alias.current

    @asynccontextmanager
    async def lease(self, model: str, caller: str = "") -> AsyncIterator[Version | None]:
        """Hold the version that `model` means now, in the engine, until the block ends; None where there is none.

        Raises Unavailable where the version cannot be loaded, or not in time, or where nothing is served as yet.
        """
        version = self.resolve(model, caller)
        if version is None:
            if model.partition("@")[0] in self.expected - self.aliases.keys():
                raise Unavailable(f"{model} is not served yet", retry_after_s=5)
            yield None
            return
        task = asyncio.current_task()
        assert task is not None
        version.requests.add(task)
        version.idle.clear()
        try:
            await self.make_resident(version, within_s=self._wait_s)
            version.last_used = time.monotonic()
            version.served += 1
            try:
                yield version
            finally:
                version.served -= 1
        finally:
            version.requests.discard(task)
            if not version.requests:
                version.idle.set()
            self._released.set()

    @asynccontextmanager
    async def coming(self, version: Version, tell: Callable[[str], None] = lambda _: None) -> AsyncIterator[None]:
        """Have a version in the engine that no name means yet; it leaves if none does when the block ends.

        `tell` gets to know the states on its way. Raises Unavailable.
        """
        version.coming += 1
        try:
            async with self._publishing:
                await self.make_resident(version, tell)
            yield
        finally:
            version.coming -= 1
            self._released.set()
            if not self._wanted(version):
                self._retire(version, math.inf)

    async def make_resident(
        self, version: Version, tell: Callable[[str], None] = lambda _: None, *, within_s: float = math.inf
    ) -> None:
        """Wait until the engine has `version`, proved. Raises Unavailable."""
        deadline = time.monotonic() + within_s
        while version.handle is None or version.leaving:
            if version.failed is not None:
                raise Unavailable(f"{version.name} cannot be served: {version.failed}")
            if version.loading is None:
                version.loading = asyncio.create_task(self._load(version, tell))
                version.loading.add_done_callback(lambda task: _loaded(version, task))
            try:
                left = None if deadline == math.inf else deadline - time.monotonic()
                await asyncio.wait_for(asyncio.shield(version.loading), left)
            except TimeoutError as error:
                raise _no_room(version) from error

    def point(self, name: str, alias: Alias, drain_s: float) -> None:
        """Let `name` mean `alias` from now on; others leave the engine when nobody holds them."""
        old = self.aliases.get(name)
        self.aliases[name] = alias  # the flip: the next request is served by the new one
        self._released.set()
        kept = set(alias.versions())
        for version in set(old.versions()) - kept if old else ():
            self._retire(version, drain_s)
        for version in alias.previous:
            if version.handle is not None and version not in (alias.current, alias.canary):
                self._retire(version, drain_s)

    def drop(self, name: str, drain_s: float) -> None:
        """Serve nothing under `name` any more."""
        for version in set(self.aliases.pop(name).versions()):
            self._retire(version, drain_s)
        self._released.set()

    async def drained(self) -> None:
        """Wait until every version that is to leave has left."""
        while self._retiring:
            await asyncio.wait(self._retiring)

    def digests(self) -> set[str]:
        """Return the versions that a name means, or that are in the engine."""
        named = {version for alias in self.aliases.values() for version in alias.versions()}
        return {version.digest for version in named | self._resident}

    @property
    def resident(self) -> int:
        """Return how many adapters the engine has."""
        return len(self._resident)

    async def look(self) -> None:
        """Ask the engine which adapters have a slot of its batches now, for `residency`. Raises ServeError."""
        self._in_slots = await self._engine.in_slots()

    def residency(self, version: Version) -> str:
        """Return where a version is.

        slot: in one of the slots of the engine's batches, on its device; memory: in the engine, ready for a slot; disk:
        in the store; absent: nowhere.
        """
        if version.handle is not None:
            return "slot" if version.name in self._in_slots else "memory"
        return "disk" if version.digest in self._store else "absent"

    async def unload(self, version: Version) -> None:
        """Take a version out of the engine's memory when those that it serves have ended, unless others come first.

        Its next request loads it again.
        """
        version.leaving = version.handle is not None
        while version.leaving and version.served:
            self._released.clear()
            await self._released.wait()
        async with self._moving:
            if version.leaving and not version.served:
                await self._forget(version, self._give_up(version))

    async def _load(self, version: Version, tell: Callable[[str], None]) -> None:
        """Have the engine read a version, in the place of another if need be. A fault is the version's own."""
        await self._moving.acquire()
        going: asyncio.Task[None] | None = None
        try:
            async with self._choosing:
                if version.handle is not None and version.leaving and not version.served:
                    await self._forget(version, self._give_up(version))
                if version.handle is not None:  # others have found a place elsewhere, or somebody uses it
                    version.leaving = False
                    return
                gone = await self._make_room(version)
                self._resident.add(version)
            if gone:
                going = self._later(self._forget(gone, self._give_up(gone)))
            try:
                await self._read(version, tell)
            except BaseException:
                self._resident.discard(version)
                raise
        except Unavailable:
            raise
        except (ServeError, AdapterError) as error:
            version.failed = str(error)
            event = "probe_failed" if isinstance(error, ProbeFailed) else "load_failed"
            self.journal.tell(Event(version.alias, event, version.name, str(error)))
            raise Unavailable(f"{version.name} cannot be served: {error}") from error
        finally:
            self._released.set()
            if going:
                going.add_done_callback(lambda _: self._moving.release())
            else:
                self._moving.release()

    async def _read(self, version: Version, tell: Callable[[str], None]) -> None:
        """Verify, admit, read and prove a version. Raises ServeError and AdapterError; then the engine is as before."""
        tell("loading")
        began = time.monotonic()
        folder = await asyncio.to_thread(self._store.verify, version.digest)
        if version.proof is None:
            header = await asyncio.to_thread(self.base.check, folder)
            version.adapts_head = any(module.endswith("lm_head") for module in header.shapes)
        handle = await self._engine.load(version.name, folder)
        read = time.monotonic()
        tell("probing")
        try:
            urgent = bool(version.requests)  # who waits for it does not wait for everybody else's requests
            proved = version.proof is None or version.coming > 0
            if version.proof is None:
                allowed = version.may_change_nothing
                version.proof = await self._prover.prove(handle, folder, may_change_nothing=allowed, urgent=urgent)
            elif version.coming:  # it is published again; what is only read again has the bytes that were proved
                await self._prover.again(handle, version.proof, urgent=urgent)
        except BaseException:
            await self._forget(version, handle)
            raise
        version.handle, version.leaving, version.loaded_at = handle, False, time.monotonic()
        seconds = {"loading": read - began, **({"probing": version.loaded_at - read} if proved else {})}
        self.journal.tell(Event(version.alias, "loaded", version.name, seconds=seconds))

    async def _make_room(self, version: Version) -> Version | None:
        """Wait until there is a place for `version`; return who has to leave for it, if anybody has to.

        Raises Unavailable when there is none for too long, or nobody waits for it any more.
        """
        began = time.monotonic()
        asked: Version | None = None  # to make room
        asked_at = 0.0
        try:
            while len(self._resident) >= self.capacity:
                self._released.clear()
                there = [v for v in self._resident if v.handle is not None and not v.coming]
                there = [v for v in there if not (v.pinned and self._wanted(v))]
                idle = [v for v in there if not v.requests or (v.leaving and not v.served)]
                if idle:
                    return min(idle, key=lambda v: v.last_used)
                now = time.monotonic()
                if now - began > self._wait_s or not (version.requests or version.coming):
                    raise _no_room(version)
                if asked and (asked not in there or now - asked_at > LEAVE_S):
                    asked.leaving, asked.loaded_at, asked = False, now, None  # a long stream: somebody else's turn
                if asked is None and there and now - began >= self._patience_s:
                    # All are in use without a pause. The one that had its place longest lets no more requests in.
                    asked, asked_at = min(there, key=lambda v: v.loaded_at), now
                    asked.leaving = True
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._released.wait(), min(self._patience_s, self._wait_s))
            return None
        finally:
            if asked:
                asked.leaving = False

    def _give_up(self, version: Version) -> Any:
        """Give a version's place to others, and return its handle for the engine to forget."""
        handle, version.handle, version.leaving = version.handle, None, False  # from here on a request loads it again
        self._resident.discard(version)
        return handle

    async def _forget(self, version: Version, handle: Any) -> None:
        try:
            await self._engine.unload(handle)
        except ServeError as error:  # it is still there, and takes up room that nobody can use
            version.failed = str(error)
            self.capacity = max(1, self.capacity - 1)
        self._released.set()
        self.journal.tell(Event(version.alias, "unloaded", version.name))

    def _retire(self, version: Version, drain_s: float) -> None:
        self._later(self._drain(version, drain_s))

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _drain(self, version: Version, drain_s: float) -> None:
        deadline = time.monotonic() + drain_s
        held = set(version.requests)  # who asks for it by its digest later is not cut off
        while version.requests and not self._wanted(version):
            left = deadline - time.monotonic()
            if left <= 0:
                for task in held & version.requests:
                    task.cancel(PAST_DEADLINE)  # as if the client had gone: the engine aborts what it computes for it
                held = set()
            with suppress(TimeoutError):
                await asyncio.wait_for(version.idle.wait(), min(left, 1.0) if left > 0 else 1.0)
        while version.loading:
            await asyncio.wait([version.loading])
        async with self._moving:
            if version.handle is not None and not (version.requests or self._wanted(version)):
                await self._forget(version, self._give_up(version))

    def _wanted(self, version: Version) -> bool:
        alias = self.aliases.get(version.alias)
        return version.coming > 0 or (alias is not None and version in (alias.current, alias.canary))


def _loaded(version: Version, task: asyncio.Task[None]) -> None:
    version.loading = None
    if not task.cancelled():
        task.exception()  # who waits for it has it; perhaps nobody does any more


def _no_room(version: Version) -> Unavailable:
    return Unavailable(f"{version.name} is waiting for room in the engine: try again", retry_after_s=5)


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
