"""Every change of an adapter has one order: turn -> read -> prepare -> write -> follow.

    turn      an adapter has one change at a time; a newer change may supersede this one until it writes (see `changes`)
    read      the document is read again
    prepare   the versions of the new entry are fetched, verified, admitted, loaded, proved and held in the engine
    write     the document's entry is replaced by compare-and-swap; a write that fails never reaches traffic
    follow    the reconciler serves the entry; if that fails, the document's entry is put back, and followed

`remove` prepares nothing and waits for no outcome: the alias is dropped as soon as the document has been written.

The alias moves only after the document has been written. The versions are held from `prepare` to the end of `follow`,
so nothing has to be loaded in between. The write compares the entry alone: changes of other adapters, by others, do not
disturb it. If others change the entry after the write, their entry is followed, and this change gets an error. A client
that disconnects cancels nothing. After a crash the server follows the document as it is.

The document is also followed when others change it: within 5 s, or at once where the file system reports changes.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Version
from astra_serve.control.changes import Changes
from astra_serve.control.desired_state import DesiredState
from astra_serve.control.followed import follow
from astra_serve.control.preparation import Preparation, Prepared
from astra_serve.control.readiness import RequiredAdapters
from astra_serve.control.reconcile import Reconciler
from astra_serve.control.status import Phase, Spent, Status
from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Canary, Document, Step
from astra_serve.document.history import known_source, rollback_history
from astra_serve.errors import Conflict, NotPublished, ServeError, Unavailable, UnknownAdapter
from converter.errors import AstraError

Edit = Callable[[Adapter | None], dict[str, Any]]  # from the entry as it is to the keys that change
BeforeWrite = Callable[[], Awaitable[None]]


class Control:
    """Follows the document of one server, and changes it."""

    def __init__(
        self,
        state: DesiredState,
        fleet: Fleet,
        store: Store,
        preparation: Preparation,
        reconciler: Reconciler,
        required: RequiredAdapters,
        clock: Clock,
    ) -> None:
        self.state, self.fleet, self.reconciler, self.changes = state, fleet, reconciler, Changes()
        self._store, self._preparation, self._required, self._clock = store, preparation, required, clock
        self._followed = Document()
        fleet.complete = False

    async def run(self) -> None:
        """Read the document and follow it until cancelled."""
        await follow(self.state, self.refresh, self._clock)

    async def refresh(self) -> None:
        """Read the document again and follow its changes; a document that cannot be read changes nothing."""
        fault = self.state.fault
        if await self.state.read():
            if fault:  # the reason for that may have been the reason why adapters failed
                self.reconciler.retry()
            self._follow()
        elif self.state.fault != fault:
            self.fleet.events.emit(Event("", "document_failed", reason=self.state.fault))

    def not_ready(self) -> list[str]:
        """Return a reason where the document has not been read yet, or a required adapter is not served yet."""
        if not self.state.read_once:
            return [f"the document has not been read: {self.state.fault or 'not yet'}"]
        return self._required.not_ready()

    async def publish(
        self,
        name: str,
        source: str,
        digest: str | None = None,
        before_write: BeforeWrite | None = None,
        **settings: Any,
    ) -> None:
        """Serve the adapter at `source` as `name`; the version that served becomes the first of its rollback history.

        `before_write` is called once the version is proved, and what it raises is the reason why it is not published.
        Raises ServeError: NotPublished with the reason when the version is not served. If that was found after the
        write, the entry is written back; if it had no digest, with that of the version that served. The error says if
        that failed.
        Conflict when somebody else has changed the entry: their entry is followed.
        """

        def edit(old: Adapter | None) -> dict[str, Any]:
            if source.startswith("sha256:"):
                return {"source": self._source(old, source), "digest": source, "canary": None, **settings}
            return {"source": source, "digest": digest, "canary": None, **settings}

        await self._change(name, "publish", edit, before_write)

    async def rollback(self, name: str, digest: str | None = None) -> None:
        """Serve the version before again, or the one with `digest` of the rollback history. Raises ServeError."""

        def edit(old: Adapter | None) -> dict[str, Any]:
            steps = [step.digest for step in _require(old, name).steps]
            target = digest or next(iter(steps), None)
            if target is None or target not in steps:
                raise ServeError(f"{name!r} has no such previous version; there are: {', '.join(steps) or 'none'}")
            return {"source": self._source(old, target), "digest": target, "canary": None}

        await self._change(name, "rollback", edit)

    async def canary(self, name: str, canary: Canary | None) -> None:
        """Give a share of the requests to another version, or end that. Raises ServeError."""

        def edit(old: Adapter | None) -> dict[str, Any]:
            found = canary
            if found and found.version.startswith("sha256:"):
                found = found.model_copy(update={"version": self._source(old, found.version), "digest": found.version})
            return {**self._as_served(old, name), "canary": found}

        await self._change(name, "canary", edit)

    async def pin(self, name: str, *, pin: bool) -> None:
        """Keep an adapter in the engine's memory, or let it be evicted. Raises ServeError."""
        await self._change(name, "pin" if pin else "unpin", lambda old: {**self._as_served(old, name), "pin": pin})

    async def remove(self, name: str) -> None:
        """Serve nothing under `name` any more. Raises ServeError."""
        async with self.changes.turn(name, "remove") as change:
            change.writing = True
            await self.refresh()
            await self.state.replace(name, _require(self.state.document.get(name), name), None)
            self._follow()

    def source(self, digest: str) -> str | None:
        """Return the source of a version in the store, if the store knows it."""
        return self._store.source(digest)

    async def prepare(self, entry: Adapter) -> Version:
        """Return the version of `entry` once the engine has proved it; no alias points at it.

        It does not wait for other changes of the adapter. Raises NotPublished.
        """
        try:
            return await self._preparation.prove(entry, Status(entry, self.fleet.events, self._clock))
        except (AstraError, OSError) as error:
            raise NotPublished(f"{entry.name!r} was not prepared: {reason_of(error)}") from error

    async def _change(self, name: str, kind: str, edit: Edit, before_write: BeforeWrite | None = None) -> None:
        """Prepare, write and follow the entry with the keys of `edit`."""
        began = self._clock.now()
        async with self.changes.turn(name, kind) as change, AsyncExitStack() as held:
            self.state.check_writable()
            await self.refresh()
            old = self.state.document.get(name)
            entry = desired.entry({"name": name, **(dict(old) if old else {}), **edit(old)})
            change.status = Status(entry, self.fleet.events, self._clock)
            try:
                prepared = await held.enter_async_context(self._preparation.hold(entry, change.status))
                if before_write:
                    await before_write()
            except (AstraError, OSError) as error:
                raise NotPublished(f"{name!r} was not published: {reason_of(error)}") from error
            spent = Spent(began, change.status.elapsed())
            change.writing, change.status = True, None
            new = self._resolved(entry, old, prepared)
            before = self._served(name)
            await self.state.replace(name, old, new)
            self._follow({name: spent})
            status = await self.reconciler.outcome(name)
            if status is None or status.entry != new:
                raise Conflict(
                    f"somebody else has changed {name!r} in the document after this {kind} had written it: "
                    "their entry is followed"
                )
            if status.phase is Phase.FAILED:
                reason = f"{name!r} was not published: {status.reason}"
                try:
                    await self._put_back(name, old, new, before)
                except ServeError as error:
                    raise NotPublished(f"{reason}; the document's entry could not be put back: {error}") from error
                raise NotPublished(reason)

    async def _put_back(self, name: str, old: Adapter | None, new: Adapter, served: Step | None) -> None:
        """Write the entry as it was, with the digest that served: the source alone may have other bytes by now."""
        if old and not old.digest and served:
            old = old.model_copy(update={"digest": served.digest})
        await self.state.replace(name, new, old)
        self._follow()

    def _resolved(self, entry: Adapter, old: Adapter | None, prepared: Prepared) -> Adapter:
        """Return an entry with the digests of its versions and its rollback history."""
        digest, canary = prepared.current.digest, entry.canary
        if canary and prepared.canary:
            canary = canary.model_copy(update={"digest": prepared.canary.digest})
        served = self._served(entry.name)
        previous = rollback_history(old, [served] if served else [], digest)
        return entry.model_copy(update={"digest": digest, "canary": canary, "previous": previous})

    def _served(self, name: str) -> Step | None:
        """Return the version that serves now, as a step of the rollback history; none is a trainer's policy."""
        alias = self.fleet.aliases.get(name)
        if alias is None or not alias.lasting:
            return None
        source = alias.source or self.source(alias.current.digest)
        return Step(digest=alias.current.digest, source=source, replaced=datetime.now(UTC).replace(microsecond=0))

    def _as_served(self, old: Adapter | None, name: str) -> dict[str, Any]:
        """Return the digest of an entry that keeps its version: its source may have other bytes by now."""
        served = self._served(name)
        return {"digest": _require(old, name).digest or (served and served.digest)}

    def _source(self, old: Adapter | None, digest: str) -> str:
        return known_source(old, digest) or self.source(digest) or digest

    def _follow(self, spent: Mapping[str, Spent] = MappingProxyType({})) -> None:
        before, document = self._followed, self.state.document
        self._followed = document
        for entry in before.adapters:
            if document.get(entry.name) is None:
                self.reconciler.remove(entry.name)
        for entry in document.adapters:
            was = before.get(entry.name)
            if was is not entry and was != entry:  # thousands are the same objects
                self.reconciler.want(entry, spent=spent.get(entry.name))
        self._required.follow(document)
        self.fleet.complete = True


def _require(entry: Adapter | None, name: str) -> Adapter:
    if entry is None:
        raise UnknownAdapter(f"there is no adapter {name!r}")
    return entry


def reason_of(error: BaseException) -> str:
    """Return the reason of a failure; what the engine's memory raises has it as its cause."""
    cause = error.__cause__ if isinstance(error, Unavailable) else None
    return str(cause or error)
