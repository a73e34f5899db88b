"""Names, the versions behind them, and who is using which: the only place that decides what a request is served by.

A name is an alias of one version; moving it is one assignment. A request resolves its name once, when it is admitted,
and holds a lease on that version until its last byte. A version leaves the engine when nobody holds it.

The engine is never asked for more adapters than it has room for: it would push one out, read it again from disk in the
middle of a step, and die if it could not. It reads a version when this module says so, and at no other time.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from astra_serve.errors import ServeError, Unavailable
from astra_serve.store import Store

SHORTEST_PREFIX = 6  # hex digits by which a request may name a version


class Engine(Protocol):
    """What is asked of the engine; `handle` is whatever it needs to know an adapter by."""

    async def load(self, name: str, folder: Path) -> Any:
        """Read an adapter and return its handle. Raises ServeError."""

    async def unload(self, handle: Any) -> None:
        """Forget an adapter, and make sure that it is forgotten. Raises ServeError."""

    async def next_tokens(self, prompts: list[list[int]], handle: Any) -> list[dict[int, float]]:
        """Return the log probabilities of the likeliest next tokens after each prompt; a handle of None is the base."""


@dataclass(eq=False)
class Version:
    """One immutable version of an adapter, under the name that it serves; `Fleet.version` makes them."""

    alias: str
    digest: str
    pinned: bool = False
    handle: Any = None  # while the engine has it
    failed: str | None = None
    last_used: float = 0.0
    requests: set[asyncio.Task[Any]] = field(default_factory=set)  # that hold a lease
    coming: int = 0  # how many are about to let a name mean it
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # set while none does
    _loading: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Return what answers call it, and requests may."""
        return f"{self.alias}@{self.digest.removeprefix('sha256:')[:12]}"


@dataclass
class Alias:
    """A public name: what it means now, what it may go back to, and who else gets a share of its requests."""

    current: Version
    previous: list[Version] = field(default_factory=list)
    canary: Version | None = None
    weight: float = 0.0

    def versions(self) -> Iterator[Version]:
        """Yield every version that a request may name."""
        yield self.current
        if self.canary:
            yield self.canary
        yield from self.previous


class Fleet:
    """The adapters of one engine, of which at most `capacity` are loaded at a time."""

    def __init__(self, engine: Engine, store: Store, capacity: int, *, wait_s: float = 30.0) -> None:
        self.aliases: dict[str, Alias] = {}
        self.expected: set[str] = set()  # names that are to be served, and may not be yet
        self._engine, self._store, self._capacity, self._wait_s = engine, store, capacity, wait_s
        self._resident: set[Version] = set()
        self._one_at_a_time = asyncio.Lock()
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
            await self.make_resident(version)
            version.last_used = time.monotonic()
            yield version
        finally:
            version.requests.discard(task)
            if not version.requests:
                version.idle.set()
            self._released.set()

    @asynccontextmanager
    async def coming(self, version: Version) -> AsyncIterator[None]:
        """Have a version in the engine that no name means yet; it leaves if none does when the block ends.

        Raises Unavailable.
        """
        version.coming += 1
        try:
            await self.make_resident(version)
            yield
        finally:
            version.coming -= 1
            self._released.set()
            if not self._wanted(version):
                self._retire(version, 0.0)

    async def make_resident(self, version: Version) -> None:
        """Wait until the engine has `version`. Raises Unavailable."""
        if version.failed is not None:
            raise Unavailable(f"{version.name} cannot be served: {version.failed}")
        if version.handle is not None:
            return
        if version._loading is None:
            version._loading = asyncio.create_task(self._load(version))
            version._loading.add_done_callback(lambda _: setattr(version, "_loading", None))
        try:
            await asyncio.wait_for(asyncio.shield(version._loading), self._wait_s)
        except TimeoutError as error:
            raise Unavailable(
                f"{version.name} is waiting for room in the engine: try again", retry_after_s=5
            ) from error

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

    def residency(self, version: Version) -> str:
        """Return where a version is: in the engine, on disk, or nowhere."""
        if version.handle is not None:
            return "engine"
        return "disk" if version.digest in self._store else "absent"

    async def _load(self, version: Version) -> None:
        async with self._one_at_a_time:
            await self._make_room()
            try:
                folder = await asyncio.to_thread(self._store.verify, version.digest)
                version.handle = await self._engine.load(version.name, folder)
            except ServeError as error:
                version.failed = str(error)
                raise Unavailable(f"{version.name} cannot be served: {error}") from error
            self._resident.add(version)

    async def _make_room(self) -> None:
        while len(self._resident) >= self._capacity:
            self._released.clear()
            idle = [v for v in self._resident if not (v.requests or v.coming or (v.pinned and self._wanted(v)))]
            if idle:
                await self._unload(min(idle, key=lambda v: v.last_used))
            else:
                await self._released.wait()

    async def _unload(self, version: Version) -> None:
        handle, version.handle = version.handle, None  # from here on a request loads it again
        try:
            if handle is not None:
                await self._engine.unload(handle)
        except ServeError as error:  # it is still there, and takes up room that nobody can use
            version.failed = str(error)
            self._capacity = max(1, self._capacity - 1)
        self._resident.discard(version)
        self._released.set()

    def _retire(self, version: Version, drain_s: float) -> None:
        task = asyncio.create_task(self._drain(version, drain_s))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _drain(self, version: Version, drain_s: float) -> None:
        deadline = time.monotonic() + drain_s
        held = set(version.requests)  # who asks for it by its digest later is not cut off
        while version.requests and not self._wanted(version):
            left = deadline - time.monotonic()
            if left <= 0:
                for task in held & version.requests:
                    task.cancel()  # as if the client had gone: the engine aborts what it computes for it
                left = 1.0
            with suppress(TimeoutError):
                await asyncio.wait_for(version.idle.wait(), left)
        async with self._one_at_a_time:
            if not (version.requests or self._wanted(version)):
                await self._unload(version)

    def _wanted(self, version: Version) -> bool:
        alias = self.aliases.get(version.alias)
        return version.coming > 0 or (alias is not None and version in (alias.current, alias.canary))


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
