"""Places in the engine: which adapters it has, who comes, and who has to go for it.

The engine is never asked for more adapters than it has room for: it would push one out, read it again from disk in the
middle of a step, and die if it could not. It reads a version when this module says so, and at no other time. What it
reads has the bytes that were published, and was proved on it before its first request.
"""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from astra_serve.adapters.admission import Base
from astra_serve.adapters.events import Event, Journal
from astra_serve.adapters.probe import Prover
from astra_serve.adapters.protocol import Engine
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Version
from astra_serve.errors import ProbeFailed, ServeError, Unavailable
from converter.adapter_dir import AdapterError

LEAVE_S = 10.0  # for a version that is asked to make room
HEADROOM = 4  # adapters that the engine has room for beyond `capacity`: they come while others go


class Places:
    """The memory of one engine, of which at most `capacity` adapters have a place at a time."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        base: Base,
        capacity: int,
        journal: Journal,
        *,
        wanted: Callable[[Version], bool],
        wait_s: float,
        patience_s: float,
    ) -> None:
        """`wanted` says whether a name means a version, or is about to; a pinned one stays as long as that is so."""
        self.capacity = capacity
        self.taken: set[Version] = set()
        self.released = asyncio.Event()  # set when somebody may have become idle, or has gone
        self._engine, self._store, self._base, self._prover = engine, store, base, Prover(engine)
        self._journal, self._wanted = journal, wanted
        self._wait_s, self._patience_s = wait_s, patience_s
        self._in_slots: set[str] = set()
        self._moving = asyncio.Semaphore(HEADROOM)  # held while an adapter comes or goes
        self._choosing = asyncio.Lock()  # of who makes room; first come, first served
        self._going: set[asyncio.Task[None]] = set()

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
            self.released.clear()
            await self.released.wait()
        async with self._moving:
            if version.leaving and not version.served:
                await self._forget(version, self._give_up(version))

    async def leave(self, version: Version) -> None:
        """Take a version out of the engine, unless somebody holds it or it is wanted by then."""
        while version.loading:
            await asyncio.wait([version.loading])
        async with self._moving:
            if version.handle is not None and not (version.requests or self._wanted(version)):
                await self._forget(version, self._give_up(version))

    async def settled(self) -> None:
        """Wait until everybody who made room has gone."""
        while self._going:
            await asyncio.wait(self._going)

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
                self.taken.add(version)
            if gone:
                going = asyncio.create_task(self._forget(gone, self._give_up(gone)))
                self._going.add(going)
                going.add_done_callback(self._going.discard)
            try:
                await self._read(version, tell)
            except BaseException:
                self.taken.discard(version)
                raise
        except Unavailable:
            raise
        except (ServeError, AdapterError) as error:
            version.failed = str(error)
            event = "probe_failed" if isinstance(error, ProbeFailed) else "load_failed"
            self._journal.tell(Event(version.alias, event, version.name, str(error)))
            raise Unavailable(f"{version.name} cannot be served: {error}") from error
        finally:
            self.released.set()
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
            header = await asyncio.to_thread(self._base.check, folder)
            version.adapts_head = any(module.endswith("lm_head") for module in header.shapes)
        handle = await self._engine.load(version.name, folder)
        read = time.monotonic()
        tell("probing")
        try:
            urgent = bool(version.requests)  # who waits for it does not wait for everybody else's requests
            if version.proof and not (version.proof.of_an_effect or version.may_change_nothing):
                version.proof = None  # it was said then that it may change nothing
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
        self._journal.tell(Event(version.alias, "loaded", version.name, seconds=seconds))

    async def _make_room(self, version: Version) -> Version | None:
        """Wait until there is a place for `version`; return who has to leave for it, if anybody has to.

        Raises Unavailable when there is none for too long, or nobody waits for it any more.
        """
        began = time.monotonic()
        asked: Version | None = None  # to make room
        asked_at = 0.0
        try:
            while len(self.taken) >= self.capacity:
                self.released.clear()
                there = [v for v in self.taken if v.handle is not None and not v.coming]
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
                    await asyncio.wait_for(self.released.wait(), min(self._patience_s, self._wait_s))
            return None
        finally:
            if asked:
                asked.leaving = False

    def _give_up(self, version: Version) -> Any:
        """Give a version's place to others, and return its handle for the engine to forget."""
        handle, version.handle, version.leaving = version.handle, None, False  # from here on a request loads it again
        self.taken.discard(version)
        return handle

    async def _forget(self, version: Version, handle: Any) -> None:
        try:
            await self._engine.unload(handle)
        except ServeError as error:  # it is still there, and takes up room that nobody can use
            version.failed = str(error)
            self.capacity = max(1, self.capacity - 1)
        self.released.set()
        self._journal.tell(Event(version.alias, "unloaded", version.name))


def _loaded(version: Version, task: asyncio.Task[None]) -> None:
    version.loading = None
    if not task.cancelled():
        task.exception()  # who waits for it has it; perhaps nobody does any more


def _no_room(version: Version) -> Unavailable:
    reason = "is waiting for room in the engine, where all adapters are in use or pinned: try again"
    return Unavailable(f"{version.name} {reason}, or give the server more --resident", retry_after_s=5)
