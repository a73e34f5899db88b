"""Names, the versions behind them, and who is using which: the only place that decides what a request is served by.

A name is an alias of one version; moving it is one assignment. A request resolves its name once, when it is admitted,
and holds a lease on that version until its last byte. A version leaves the engine when nobody holds it.

`places` sees to it that the engine has the version by then.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from weakref import WeakValueDictionary

from astra_serve.adapters.admission import Base
from astra_serve.adapters.events import Journal
from astra_serve.adapters.protocol import Engine
from astra_serve.adapters.residency import HEADROOM, Places
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Alias, Version
from astra_serve.errors import Unavailable

# The message of a cancellation: whose version is replaced, or whose server ends, and who has had time enough.
PAST_DEADLINE = "the request was not finished before the deadline of its version, or of the server"
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
        self.base = base
        self.places = Places(
            engine, store, base, capacity, self.journal, wanted=self._wanted, wait_s=wait_s, patience_s=patience_s
        )
        self._wait_s = wait_s
        self._publishing = asyncio.Semaphore(HEADROOM - 1)  # so that requests need not wait for the probes of others
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
            await self.places.make_resident(version, within_s=self._wait_s)
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
            self.places.released.set()

    @asynccontextmanager
    async def coming(self, version: Version, tell: Callable[[str], None] = lambda _: None) -> AsyncIterator[None]:
        """Have a version in the engine that no name means yet; it leaves if none does when the block ends.

        `tell` gets to know the states on its way. Raises Unavailable.
        """
        version.coming += 1
        try:
            async with self._publishing:
                await self.places.make_resident(version, tell)
            yield
        finally:
            version.coming -= 1
            self.places.released.set()
            if not self._wanted(version):
                self._retire(version, math.inf)

    def point(self, name: str, alias: Alias, drain_s: float) -> None:
        """Let `name` mean `alias` from now on; others leave the engine when nobody holds them."""
        old = self.aliases.get(name)
        self.aliases[name] = alias  # the flip: the next request is served by the new one
        self.places.released.set()
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
        self.places.released.set()

    async def drained(self) -> None:
        """Wait until every version that is to leave has left."""
        while self._retiring:
            await asyncio.wait(self._retiring)
        await self.places.settled()

    def digests(self) -> set[str]:
        """Return the versions that a name means, or that are in the engine."""
        named = {version for alias in self.aliases.values() for version in alias.versions()}
        return {version.digest for version in named | self.places.taken}

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
                    task.cancel(PAST_DEADLINE)  # as if the client had gone: the engine aborts what it computes for it
                held = set()
            with suppress(TimeoutError):
                await asyncio.wait_for(version.idle.wait(), min(left, 1.0) if left > 0 else 1.0)
        await self.places.leave(version)

    def _wanted(self, version: Version) -> bool:
        alias = self.aliases.get(version.alias)
        return version.coming > 0 or (alias is not None and version in (alias.current, alias.canary))


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
