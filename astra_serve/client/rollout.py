"""A new version on every replica, or the document's old entry is restored.

    read      every replica follows the present document; its present version of the adapter serves, or has failed
    prepare   every replica fetches, verifies and loads the version, and proves it on its engine; no alias points at it
    verify    all replicas have the same version
    flip      the document names the version by its digest (compare-and-swap of the entry); a canary ends
    serve     every replica has read the document, and serves the version

The replicas work in parallel; the timeout holds for each step and replica, and every single answer but that of
`prepare` may take at most 30 s.

If anything fails after the flip, a signal included, the document's entry is restored, or removed if there was none. An
old entry without a digest gets that of the version that was served, if all replicas served the same. An entry that
somebody else has changed since the flip stays as it is, and so does a new entry that was there before the flip. The
store is tried for 60 s, and then the replicas that answer are waited for, 60 s each; a second signal does not interrupt
that. A rollout that is killed leaves the new document or the old one, complete, and the replicas follow it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from astra_serve.client import calls
from astra_serve.client.replicas import Replica, of_all
from astra_serve.client.state import AdapterState, DocumentState, VersionState
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Document, Step
from astra_serve.document.entry_text import with_entry
from astra_serve.document.history import known_source, rollback_history
from astra_serve.errors import BadDocument, Conflict, ServeError
from converter.errors import first_line

POLL_S = 0.2
READS = 3  # of a document that others change, until the replicas have read the same text as this process
RESTORE_S = 60.0  # for a store that fails to take the document back, and for replicas to serve the version before
INHERITED = {"required", "pin", "allow_no_effect"}  # settings of an entry whose version changes

Report = Callable[[str, str], None]  # called with a step, and what happened


async def prepare(
    name: str, wanted: dict[str, Any], replicas: Sequence[Replica], report: Report, timeout_s: float
) -> VersionState:
    """Let every replica prove the version that `wanted` describes, and return it as a replica describes it.

    `wanted` has the parameters of `calls.prepare`. Raises ServeError where a replica cannot, or replicas differ.
    """

    call = calls.prepare(name, **wanted)

    async def one(replica: Replica) -> VersionState:
        version = await replica.ask(call, timeout_s)
        effect = f"{version.probe.effect:.2f} nats from the base" if version.probe else "proved before"
        report("prepare", f"{replica.name} has {version.name}, {effect}")
        return version

    versions = await of_all(replicas, one)
    digests = [version.digest for version in versions]
    if len(set(digests)) > 1:
        found = "; ".join(f"{digest} at {replica.name}" for digest, replica in zip(digests, replicas, strict=True))
        raise ServeError(f"{wanted['source']} is not the same everywhere: {found}")
    report("verify", f"{digests[0]} at all {len(replicas)}")
    return versions[0]


async def rollout(
    name: str,
    wanted: dict[str, Any],
    replicas: Sequence[Replica],
    report: Report,
    timeout_s: float,
    where: str | None = None,
) -> Adapter:
    """Serve the version that `wanted` describes as `name` at every replica, and return the document's entry.

    `where` is the document, as seen from here; by default the place that the replicas report.
    Raises ServeError; its text says what could not be restored, if anything.
    """
    where, document = await _document(replicas, where)
    old = document.get(name)
    adapters = await of_all(replicas, lambda replica: _outcome(replica, name, timeout_s))
    served = [(adapter, adapter.version) for adapter in adapters if adapter and adapter.version]
    inherited = old.model_dump(include=INHERITED, exclude_defaults=True) if old else {}
    try:
        version = await prepare(name, {**inherited, **wanted}, replicas, report, timeout_s)
    except ServeError as error:
        raise ServeError(f"{error}; nothing was changed") from error
    now = datetime.now(UTC).replace(microsecond=0)
    steps = [Step(digest=one.digest, source=one.source, replaced=now) for _, one in served]
    digest, source = version.digest, wanted["source"]
    if source.startswith("sha256:"):
        source = known_source(old, digest) or version.source or source
    previous = rollback_history(old, steps, digest)
    new = desired.entry({"name": name, **inherited, **wanted, "source": source, "digest": digest, "previous": previous})
    proved = {one.digest for adapter, one in served if adapter.state == "serving"}
    flip = Flip(where, document, new, proved.pop() if len(proved) == 1 else None)
    await _flip(flip, replicas, report, timeout_s)
    return new


@dataclass
class Flip:
    """One change of an entry of the document at `where`, from the entry in `seen` to `new`; and its restoration.

    `served` is the version that was served before: an entry without a digest gets it when the entry is restored,
    because its source may have other bytes by now.
    """

    where: str
    seen: Document
    new: Adapter
    served: str | None
    written: bool = False  # or perhaps written
    _before: str = ""  # the text
    _after: str = ""

    @property
    def old(self) -> Adapter | None:
        """Return the entry as it was, or None."""
        return self.seen.get(self.new.name)

    def write(self) -> None:
        """Replace the entry. Raises ServeError where the document has changed since, or cannot be written."""

        def change(text: str) -> str:
            if not text.strip() and self.seen.adapters:
                raise BadDocument(f"{self.where} is empty or gone meanwhile")
            if self._agrees(text):
                return text  # another rollout's change, and not this one's to undo
            _, changed = with_entry(text, self.where, self.new.name, self.old, self.new)
            self.written = True
            return changed

        self._before, self._after = _edit(self.where, change)

    def restore(self) -> str | None:
        """Restore the entry; return the reason if there is nothing to restore, else None. Raises ServeError."""
        nothing: str | None = None

        def change(text: str) -> str:
            nonlocal nothing
            there = desired.parse(text, self.where).get(self.new.name)
            if there != self.new:
                nothing = "as before" if there == self.old else "as somebody else has written it"
                return text
            entry = self.old
            if entry and not entry.digest:
                entry = entry.model_copy(update={"digest": self.served})
            if entry == self.old and text == self._after and self._before.strip():
                return self._before
            return with_entry(text, self.where, self.new.name, self.new, entry)[1]

        _edit(self.where, change)
        return nothing and f"the document is {nothing}"

    def check(self) -> None:
        """Raise Conflict unless the document still has `new`: stores without conditions let others overwrite it."""
        if not self._agrees(_read(self.where)):
            raise Conflict(f"somebody else has changed {self.new.name!r} in the document meanwhile")

    def _agrees(self, text: str) -> bool:
        """Return whether the document has the new entry, whatever its history."""
        there = desired.parse(text, self.where).get(self.new.name)
        return there is not None and there.model_copy(update={"previous": self.new.previous}) == self.new


async def _flip(flip: Flip, replicas: Sequence[Replica], report: Report, timeout_s: float) -> None:
    """Write the new entry and wait until every replica serves it, or restore the old one. Raises ServeError."""
    writing = asyncio.create_task(asyncio.to_thread(flip.write))
    name, digest = flip.new.name, flip.new.digest
    try:
        await asyncio.shield(writing)
        report("flip", flip.where)
        await of_all(replicas, lambda replica: _serves(replica, name, digest, report, timeout_s), fail_fast=True)
        await asyncio.to_thread(flip.check)
    except BaseException as error:
        await _uncancelled(asyncio.wait([writing]))  # a thread cannot be cancelled
        if not flip.written:
            raise
        reason = str(error) or "interrupted"
        report("restore", f"{reason}: the document's entry is restored, which may take a moment")
        outcome = await _uncancelled(_restore(flip, replicas, report))
        if isinstance(error, ServeError):
            raise ServeError(f"{error}; {outcome}") from error
        report("restore", outcome)
        raise


async def _restore(flip: Flip, replicas: Sequence[Replica], report: Report) -> str:
    """Restore the document's entry, wait for the replicas that answer, and return the outcome."""
    end = asyncio.get_running_loop().time() + RESTORE_S
    while True:
        try:
            if nothing := await asyncio.to_thread(flip.restore):
                return nothing
            break
        except ServeError as error:
            if asyncio.get_running_loop().time() > end:
                return f"the document's entry could not be restored: {error}"
            await asyncio.sleep(1)
    if flip.old is not None and flip.served is None:  # the version before is unknown
        waits: list[Coroutine[Any, Any, Any]] = [_outcome(replica, flip.new.name, RESTORE_S) for replica in replicas]
    else:
        waits = [_serves(replica, flip.new.name, flip.served, report, RESTORE_S) for replica in replicas]
    ended = await asyncio.gather(*waits, return_exceptions=True)
    missing = [replica.name for replica, one in zip(replicas, ended, strict=True) if isinstance(one, BaseException)]
    late = f"; these replicas do not serve the version before yet: {', '.join(missing)}" if missing else ""
    return f"the document's entry is restored{late}"


async def _document(replicas: Sequence[Replica], where: str | None) -> tuple[str, Document]:
    """Return where the document is, and its entries. Raises ServeError unless all replicas follow its present text."""
    found = await of_all(replicas, _refreshed)
    places = {document.where for document in found}
    if where is None and len(places) > 1:
        raise ServeError(f"the replicas follow different documents: {', '.join(sorted(places))}")
    where = where or places.pop()
    if "://" not in where and not Path(where).exists():
        raise ServeError(
            f"the replicas' document is {where}, which is not there as seen from here: give --document, or write "
            "'adapters: []' into it; where it is a ConfigMap `prepare`, change it, and wait with `status --wait`"
        )
    try:
        document_text.check_writable(where)
    except ServeError as error:
        raise ServeError(f"{error}; `prepare` first, and `status --wait` after that") from error
    for _ in range(READS):
        text = await asyncio.to_thread(_read, where)
        differs = [one.digest != document_text.digest(text) for one in found]
        if not any(differs):
            return where, desired.parse(text, where)
        found = await of_all(replicas, _refreshed)  # somebody may have changed it between the two reads
    raise ServeError(
        f"{replicas[differs.index(True)].name} does not follow the text at {where}: is it the same document?"
    )


async def _refreshed(replica: Replica) -> DocumentState:
    """Let a replica read the document, and return its state. Raises ServeError where it cannot follow it."""
    document = await replica.ask(calls.refresh())
    calls.check_followed(replica.name, document)
    return document


def _read(where: str) -> str:
    try:
        return document_text.read(where)
    except Exception as error:  # each store has errors of its own
        raise ServeError(f"the document at {where} cannot be read from here: {first_line(error)}") from error


def _edit(where: str, change: Callable[[str], str]) -> tuple[str, str]:
    try:
        return document_text.edit(where, change)
    except ServeError:
        raise
    except Exception as error:
        raise ServeError(f"the document at {where} cannot be changed: {first_line(error)}") from error


async def _outcome(replica: Replica, name: str, timeout_s: float) -> AdapterState | None:
    """Wait until an adapter is served or failed, and return it; None where there is none. Raises ServeError."""
    try:
        async with asyncio.timeout(timeout_s):
            while (found := await replica.adapter(name)) and not found.settled:
                await asyncio.sleep(POLL_S)
            return found
    except TimeoutError as error:
        raise ServeError(f"{replica.name} does not serve it within {timeout_s:.0f} s") from error


async def _serves(replica: Replica, name: str, digest: str | None, report: Report, timeout_s: float) -> None:
    """Let a replica read the document, and wait until it serves `digest` as `name`; None is no version.

    Raises ServeError where it does not.
    """
    await _refreshed(replica)
    found = await _outcome(replica, name, timeout_s)
    version = found and found.version
    if found and found.state == "failed":
        raise ServeError(f"{replica.name} does not serve it: {found.reason}")
    if (version and version.digest) != digest:
        raise ServeError(f"{replica.name} still serves {version.name if version else 'nothing'}")
    if version:
        report("serve", f"{replica.name} serves {version.name}")


async def _uncancelled(work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of `work` when it has ended; cancellations do not interrupt it."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    return task.result()
