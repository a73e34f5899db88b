"""From an entry to its versions: fetched, verified, admitted, loaded, proved, and held in the engine.

This is the first step of every change (prepare, write the document, follow it), and all that following has to do. The
source is read only if the store does not have the digest that the entry names.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event
from astra_serve.adapters.fetch import Sources, fetch, local_path
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Version
from astra_serve.control.status import Phase, Status
from astra_serve.document.desired import DIGEST, Adapter
from astra_serve.errors import CannotFetch, Damaged, ServeError
from converter.errors import without_secrets

KEPT_S = 3600.0  # the time for which a version that was proved for later stays in the store


@dataclass(frozen=True)
class Prepared:
    """The versions of an entry."""

    current: Version
    canary: Version | None


class Preparation:
    """Prepares versions for one fleet."""

    def __init__(
        self,
        fleet: Fleet,
        store: Store,
        clock: Clock,
        roots: tuple[Path, ...] = (),
        sources: Sources | None = None,
        *,
        urgent: bool = False,
    ) -> None:
        """`roots` are the folders that local adapters must be in; none: they may be anywhere.

        The probes of an `urgent` one are not computed behind the requests of users.
        """
        self.sources = sources or Sources()
        self._fleet, self._store, self._clock, self._roots, self._urgent = fleet, store, clock, roots, urgent
        self._for_later: dict[str, tuple[Version, float]] = {}

    @asynccontextmanager
    async def hold(self, entry: Adapter, status: Status, *, again: bool = True) -> AsyncIterator[Prepared]:
        """Yield the versions of `entry`, proved, and keep them in the engine until the block ends.

        Without `again` a version that the name serves already, proved, need not be loaded for that.
        Raises ServeError, AdapterError and OSError.
        """
        if entry.name == self._fleet.base_name:
            raise ServeError("it has the base's name: requests for the base would get the adapter")
        with self._store.keeping() as kept:  # nothing else refers yet to the versions that it adds
            async with AsyncExitStack() as holds:
                current = await self._version(entry.name, entry.source, entry.digest, status, kept)
                canary = None
                if entry.canary:
                    canary = await self._version(entry.name, entry.canary.version, entry.canary.digest, status, kept)
                status.enter(Phase.LOADING)
                for version in (current, canary) if canary else (current,):
                    if again or entry.pin or not self._served(version):
                        hold = self._fleet.residency.hold(
                            version, allow_no_effect=entry.allow_no_effect, urgent=self._urgent
                        )
                        loaded = self._fleet.residency.of(version).loaded
                        residence = await holds.enter_async_context(hold)
                        for part, seconds in () if loaded else residence.seconds.items():
                            status.parts[part] = status.parts.get(part, 0.0) + seconds
                yield Prepared(current, canary)

    async def prove(self, entry: Adapter, status: Status) -> Version:
        """Return the version of `entry`, proved; its proof and the store's copy of it stay for later.

        Raises ServeError, AdapterError and OSError.
        """
        async with self.hold(entry, status) as prepared:
            self._for_later[entry.name] = prepared.current, self._clock.now()
        self._fleet.events.emit(Event(entry.name, "prepared", prepared.current.name))
        return prepared.current

    def for_later(self) -> set[Version]:
        """Return the versions that were proved for later in the last hour."""
        recent = self._clock.now() - KEPT_S
        self._for_later = {name: (v, when) for name, (v, when) in self._for_later.items() if when > recent}
        return {version for version, _ in self._for_later.values()}

    def _served(self, version: Version) -> bool:
        alias, residence = self._fleet.aliases.get(version.alias), self._fleet.residency.of(version)
        return bool(alias and version in alias.serving() and residence.proof and residence.failed is None)

    async def _version(self, name: str, source: str, expected: str | None, status: Status, kept: list[str]) -> Version:
        """Return the version of a source, which the store has then, and keeps."""
        stored = source.startswith("sha256:")
        if stored and not re.fullmatch(DIGEST, source):
            raise ServeError(f"{source[:80]!r} is no digest: sha256: and 64 hexadecimal digits")
        digest = source if stored else expected
        kept += [digest] if digest else []
        if digest is None or not await asyncio.to_thread(self._store.intact, digest):
            if stored:
                raise ServeError(f"the store has no version {source[:19]}, or not all of it: give its source")
            digest = await self._fetched(source, expected, status, kept)
        return Version(name, digest)

    async def _fetched(self, source: str, expected: str | None, status: Status, kept: list[str]) -> str:
        """Return the digest of the version that is at a source now."""
        before = status.seen[source] = await self.sources.fingerprint(source)
        status.enter(Phase.FETCHING)
        folder = await fetch(source, self._store, self._roots, self.sources)
        status.enter(Phase.VERIFYING)
        try:
            digest = await self.sources.read(source, self._store.add, folder, expected, source, kept)
        except Damaged as error:
            raise Damaged(f"{without_secrets(source)}: {error}") from error
        if local_path(source) and await self.sources.fingerprint(source) != before:
            raise CannotFetch(f"{source} was changed while it was read: is it complete?")
        return digest
