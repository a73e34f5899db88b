"""From the desired state to what is served: every adapter on its own way, whatever happens to the others.

    pending -> fetching -> verifying -> loading -> probing -> serving        (the alias moves at the last arrow)
                                   \\-> failed: the version before serves on

An adapter that leaves the document is drained and unloaded. What may heal by itself (a source that cannot be read, or
whose bytes are not the ones that were named) is tried again, later and later, and as soon as something changes there;
what cannot is tried again when its entry changes, or when a document that could not be read is there again.
"""

import asyncio
import re
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from astra_serve.adapters.events import Event
from astra_serve.adapters.fetch import fetch, mark
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Alias, Version
from astra_serve.document.desired import DIGEST, Adapter, Document
from astra_serve.errors import CannotFetch, Damaged, ServeError, Unavailable
from converter.adapter_dir import AdapterError
from converter.errors import without_secrets

RETRIES_S = (1.0, 5.0, 30.0, 120.0)  # waits between tries; the last one over and over
LOOK_S = 5.0  # between looks at a source meanwhile: what heals there is served within 10 s
PREPARED_S = 3600.0  # how long a version that was prepared is kept, if no name comes to mean it


@dataclass
class Status:
    """Where an adapter is on its way."""

    entry: Adapter
    state: str = "pending"
    reason: str | None = None  # of a failure
    since: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=dict)  # how long each state of the last change took

    def enter(self, state: str, reason: str | None = None) -> None:
        now = time.time()
        self.seconds[self.state] = now - self.since
        self.state, self.reason, self.since = state, reason, now


class Reconciler:
    """Makes a fleet what a document says."""

    def __init__(
        self,
        fleet: Fleet,
        store: Store,
        *,
        drain_s: float = 600.0,
        keep_versions: int = 3,
        roots: tuple[Path, ...] = (),
    ) -> None:
        self.status: dict[str, Status] = {}
        self._fleet, self._store = fleet, store
        self._drain_s, self._keep, self._roots = drain_s, keep_versions, roots
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._awaited: set[str] = set()  # what the server is not ready without
        self._prepared: dict[str, tuple[Version, float]] = {}  # the last one of a name, and when
        self._preparing = 0
        self._now = asyncio.Event()  # set to end the waits between tries

    def apply(self, document: Document) -> None:
        """Start to make `document` true; entries that are as they were are left alone."""
        for name in [name for name in self.status if document.get(name) is None]:
            self.remove(name)
        for entry in document.adapters:
            self.bring(entry)

    async def serve_all(self, document: Document) -> None:
        """Serve a document that will not change. Raises ServeError where one of its adapters fails."""
        self.apply(document)
        for entry in document.adapters:
            status = await self.settled(entry.name)
            if status.state == "failed":
                raise ServeError(f"adapter {entry.name!r}: {status.reason}")

    def bring(self, entry: Adapter, *, again: bool = False) -> None:
        """Start to serve one adapter as `entry` says, if that is not what is done already, or is wanted `again`."""
        if not entry.required:
            self._awaited.discard(entry.name)
        known = self.status.get(entry.name)
        if again or known is None or known.entry != entry:
            self._stop(entry.name)
            self._fleet.expected.add(entry.name)
            self.status[entry.name] = Status(entry)
            self._tasks[entry.name] = asyncio.create_task(self._bring(self.status[entry.name]))

    def retry(self) -> None:
        """Try again now what has failed."""
        self._now.set()
        self._now = asyncio.Event()
        for name, status in list(self.status.items()):
            if status.state == "failed" and name not in self._tasks:
                self.bring(status.entry, again=True)

    async def prepare(self, entry: Adapter) -> Version:
        """Return the version that `entry` means once the engine has proved it; no name means it by that.

        It leaves the engine again: what is served needs the room. The proof and the store's copy stay, so that serving
        it takes a moment. Raises ServeError and AdapterError.
        """
        self._preparing += 1
        try:
            async with AsyncExitStack() as coming:
                version = await self._version(entry, entry.source, entry.digest, Status(entry), coming)
        finally:
            self._preparing -= 1
        self._prepared[entry.name] = version, time.monotonic()
        self._fleet.journal.tell(Event(entry.name, "prepared", version.name))
        return version

    def adopt(self, entry: Adapter) -> None:
        """Take what serves for what `entry` says, if that is the version which it names."""
        alias, status = self._fleet.aliases.get(entry.name), self.status.get(entry.name)
        if alias and status and status.state == "serving" and alias.current.digest == entry.digest:
            status.entry = entry
            self._fleet.point(entry.name, self._alias(entry, alias.current, alias.canary), self._drain_s)

    def tend(self) -> None:
        """Do what has to be done from time to time: bring up again what was damaged, and remove old versions."""
        for name, status in self.status.items():
            alias = self._fleet.aliases.get(name)
            if alias is None or status.state != "serving":
                continue
            reason = alias.current.failed or (alias.canary and alias.canary.failed)
            if reason:
                self._enter(status, "failed", reason)
                self.bring(status.entry, again=True)
        if not self._preparing and all(status.state in ("serving", "failed") for status in self.status.values()):
            self._collect()  # nothing is being published that nobody refers to yet

    def remove(self, name: str) -> None:
        """Serve nothing under `name` any more."""
        if name not in self.status:
            return
        self._stop(name)
        self._awaited.discard(name)
        self._fleet.expected.discard(name)
        del self.status[name]
        if name in self._fleet.aliases:
            self._fleet.drop(name, self._drain_s)
        self._fleet.journal.tell(Event(name, "removed"))

    def await_required(self) -> None:
        """Let the server not be ready before the required adapters that there are now have been served.

        To be called once, with the first document. A required adapter that comes later and cannot be served would take
        all replicas out of rotation at once, and with them every adapter that they serve.
        """
        self._awaited = {name for name, status in self.status.items() if status.entry.required}

    def not_ready(self) -> list[str]:
        """Return why the server is not ready: the required adapters that it waits for."""
        return [f"{name}: {status.state}" for name, status in self.status.items() if name in self._awaited]

    def tell_of_document(self, fault: str) -> None:
        """Let it be known that the document as it is now is not followed."""
        self._fleet.journal.tell(Event("", "document_failed", reason=fault))

    async def settled(self, name: str) -> Status:
        """Wait until an adapter is served or failed, and return its status. Raises KeyError."""
        while (status := self.status[name]).state not in ("serving", "failed"):
            await self._fleet.journal.change()
        return status

    def record(self, version: Version) -> dict[str, Any]:
        """Return what is known of a version."""
        return {
            "name": version.name,
            "digest": version.digest,
            "residency": self._fleet.places.residency(version),
            "requests": len(version.requests),
            "failed": version.failed,
            "probe": asdict(version.proof.verdict) if version.proof else None,
        }

    async def close(self) -> None:
        """Stop what is on its way."""
        for name in list(self._tasks):
            self._stop(name)

    async def _bring(self, status: Status) -> None:
        name = status.entry.name
        waits = iter(RETRIES_S)
        wait = RETRIES_S[0]
        seen: list[Any] | None = None
        try:
            while True:
                try:
                    await self._serve(status)
                    return
                except (CannotFetch, Damaged, OSError) as error:
                    wait = next(waits, RETRIES_S[-1])
                    self._enter(status, "failed", f"{error}; trying again in {wait:.0f} s")
                except Unavailable as error:
                    if error.retry_after_s is None:
                        self._enter(status, "failed", str(error.__cause__ or error))
                        return
                    wait = float(error.retry_after_s)  # the engine is full of adapters in use
                    self._enter(status, "failed", str(error))
                except (ServeError, AdapterError) as error:
                    self._enter(status, "failed", str(error))
                    return
                except Exception as error:  # a fault of ours must not stay unseen, nor stop the others
                    self._enter(status, "failed", f"{type(error).__name__}: {error}")
                    raise
                seen = await self._wait(status.entry, wait, seen)
                self._enter(status, "pending")
        finally:
            if self._tasks.get(name) is asyncio.current_task():
                del self._tasks[name]

    async def _wait(self, entry: Adapter, seconds: float, seen: list[Any] | None) -> list[Any]:
        """Wait until an adapter is to be tried again: so long, or until its sources change, or all are.

        Return how its sources look then; `seen` is how they looked before the last try, if that is known.
        """
        sources = [entry.source, *([entry.canary.version] if entry.canary else [])]

        async def look() -> list[Any]:
            return [await asyncio.to_thread(mark, source) for source in sources]

        end, now = time.monotonic() + seconds, self._now
        seen = seen or await look()
        while True:
            left = end - time.monotonic()
            with suppress(TimeoutError):
                await asyncio.wait_for(now.wait(), max(0.0, min(LOOK_S, left)))
            found = await look()
            if now.is_set() or left <= LOOK_S or found != seen:
                return found

    async def _serve(self, status: Status) -> None:
        entry = status.entry
        async with AsyncExitStack() as coming:
            current = await self._version(entry, entry.source, entry.digest, status, coming)
            canary = None
            if entry.canary:
                canary = await self._version(entry, entry.canary.version, None, status, coming)
                canary.pinned = entry.pin
            current.pinned = entry.pin
            self._fleet.point(entry.name, self._alias(entry, current, canary), self._drain_s)
            self._awaited.discard(entry.name)
            self._enter(status, "serving")

    def _alias(self, entry: Adapter, current: Version, canary: Version | None) -> Alias:
        previous = [self._fleet.version(entry.name, d) for d in entry.previous if d != current.digest]
        weight = entry.canary.weight if entry.canary else 0.0
        return Alias(current, previous, canary, weight)

    async def _version(
        self, entry: Adapter, source: str, expected: str | None, status: Status, coming: AsyncExitStack
    ) -> Version:
        """Return a version that was fetched, checked, loaded and proved; the one that serves already, if it is that.

        It stays in the engine until `coming` ends, and then if a name means it.
        """
        if entry.name == self._fleet.base.name:
            raise ServeError("it has the base's name: requests for the base would get the adapter")
        stored = source.startswith("sha256:")
        digest = source if stored else expected
        if stored and not re.fullmatch(DIGEST, source):
            raise ServeError(f"{source[:80]!r} is no digest: sha256: and 64 hexadecimal digits")
        if digest is None or not await asyncio.to_thread(self._store.whole, digest):
            if stored:
                raise ServeError(f"the store has no version {source[:19]}, or not all of it: give its source")
            self._enter(status, "fetching")
            folder = await self._fetch(source)
            self._enter(status, "verifying")
            try:
                digest = await asyncio.to_thread(self._store.add, folder, expected)
            except Damaged as error:
                raise Damaged(f"{without_secrets(source)}: {error}") from error
        version = self._fleet.version(entry.name, digest)
        version.may_change_nothing = entry.allow_no_effect
        await coming.enter_async_context(self._fleet.coming(version, lambda state: self._enter(status, state)))
        return version

    async def _fetch(self, source: str) -> Path:
        """Return the folder of a source; a download that nobody waits for any more is removed when it ends."""
        fetching = asyncio.create_task(asyncio.to_thread(fetch, source, self._store, self._roots))
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:

            def forget(done: asyncio.Task[Path]) -> None:
                if not (done.cancelled() or done.exception()):
                    self._store.forget(done.result())

            fetching.add_done_callback(forget)
            raise

    def _collect(self) -> None:
        """Remove what nothing refers to from the store, but for the newest of it."""
        recent = time.monotonic() - PREPARED_S
        self._prepared = {name: (v, when) for name, (v, when) in self._prepared.items() if when > recent}
        kept = self._fleet.digests() | {version.digest for version, _ in self._prepared.values()}
        for status in self.status.values():
            entry = status.entry
            named = (entry.digest, entry.source, entry.canary and entry.canary.version, *entry.previous)
            kept |= {digest for digest in named if digest and digest.startswith("sha256:")}
        self._store.collect(kept, self._keep)

    def _stop(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    def _enter(self, status: Status, state: str, reason: str | None = None) -> None:
        status.enter(state, reason)
        alias = self._fleet.aliases.get(status.entry.name)
        version = alias.current.name if alias and state == "serving" else None
        seconds = status.seconds if state in ("serving", "failed") else {}
        self._fleet.journal.tell(Event(status.entry.name, state, version, reason, dict(seconds)))
