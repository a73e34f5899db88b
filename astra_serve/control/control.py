"""The desired state as a running server has it: where it is read from, how it is edited, and that it is followed."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from watchfiles import awatch

from astra_serve.adapters.fleet import Fleet
from astra_serve.control.reconcile import Reconciler, Status
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Canary, Document
from astra_serve.errors import BadDocument, ServeError
from converter.errors import first_line, without_secrets

TIMER_S = 5.0  # a changed file or page is seen after this long at the latest


class Control:
    """Follows the document at `where`, a file or a URL, and edits it if it is a file."""

    def __init__(self, where: str, fleet: Fleet, reconciler: Reconciler) -> None:
        self.fleet, self.reconciler = fleet, reconciler
        self.fault: str | None = None  # why the document as it is now is not followed
        self._where = where
        self._document = Document()
        self._read_once = False
        self._text = ""  # as the file was read or written last
        self._etag = ""
        self._editing = asyncio.Lock()  # of the document, for as long as it takes to write it
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # of an adapter, until it serves

    def document(self) -> dict[str, str | None]:
        """Return where the document is, the digest of its text as it is followed, and why it is not as it is now."""
        where = str(self.file.absolute()) if self.file else without_secrets(self._where)
        return {
            "where": where,
            "digest": document_text.digest(self._text) if self._read_once else None,
            "fault": self.fault,
        }

    @property
    def file(self) -> Path | None:
        """Return the document's file; None where it is a page somewhere, and only read."""
        return None if "://" in self._where else Path(self._where)

    async def follow(self) -> None:
        """Read the document and follow it until cancelled; what cannot be read changes nothing."""
        due = asyncio.Event()
        watching = asyncio.create_task(_watch(self.file, due)) if self.file else None
        try:
            while True:
                due.clear()
                await self.refresh()
                with suppress(TimeoutError):
                    await asyncio.wait_for(due.wait(), TIMER_S)
        finally:
            if watching:
                watching.cancel()

    async def refresh(self) -> None:
        """Read the document again and apply what changed in it; what is on its way by other means goes on."""
        async with self._editing:
            try:
                document, text = await self._read()
            except Exception as error:  # whatever is wrong with the file, the page or the way to it
                fault = first_line(error)
                if fault != self.fault:
                    self.reconciler.tell_of_document(fault)
                self.fault = fault
                return
            if self.fault:  # whatever kept the document away may have kept adapters away, too
                self.reconciler.retry()
            first, self.fault, self._read_once = not self._read_once, None, True
            before, self._document, self._text = self._document, document, text
        self._follow(before, document)
        if first:
            self.reconciler.await_required()

    def not_ready(self) -> list[str]:
        """Return why it is not known yet what is to be served, if it is not."""
        return [] if self._read_once else [f"the document has not been read: {self.fault or 'not yet'}"]

    async def publish(self, name: str, source: str, **settings: Any) -> Status:
        """Let `name` mean what is at `source`, and return its status when it is served, or failed.

        What it meant before becomes the first of its previous versions. The document is as before where it failed.
        Raises ServeError.
        """
        changed = {"source": source, "digest": None, "canary": None, **settings}
        return await self._try(name, lambda old: {**(old.model_dump() if old else {"name": name}), **changed})

    async def rollback(self, name: str, digest: str | None = None) -> Status:
        """Let `name` mean its previous version again, or the one with `digest`. Raises ServeError and KeyError."""

        def back(old: Adapter | None) -> dict[str, Any]:
            entry = _there(old, name)
            target = digest or next(iter(entry.previous), None)
            if target is None or target not in entry.previous:
                known = ", ".join(entry.previous) or "none"
                raise ServeError(f"{name!r} has no such previous version; there are: {known}")
            return {**entry.model_dump(), "source": target, "digest": target, "canary": None}

        return await self._try(name, back)

    async def change(self, name: str, **settings: Any) -> Status:
        """Change settings of `name`, as pin or canary. Raises ServeError and KeyError."""
        return await self._try(name, lambda old: {**_there(old, name).model_dump(), **settings})

    async def remove(self, name: str) -> None:
        """Serve nothing under `name` any more. Raises ServeError and KeyError."""
        async with self._changing[name]:
            _there(self._document.get(name), name)
            await self._edit(lambda document: document.without(name))

    async def _try(self, name: str, change: Callable[[Adapter | None], dict[str, Any]]) -> Status:
        """Bring up what `change` makes of an entry, write it into the document once it serves, return its status."""
        self._writable()
        await self.refresh()
        async with self._changing[name]:
            old = self._document.get(name)
            entry = Adapter.model_validate(change(old))
            self.reconciler.bring(entry, again=True)
            status = await self.reconciler.settled(name)
            if status.entry != entry:
                raise ServeError(f"the document changed {name!r} meanwhile: try again")
            if status.state == "failed":
                await self._restore(name)
                return status
            served = self._as_served(entry, old)
            try:
                await self._edit(lambda document: document.replacing(name, old, served), served)
            except (OSError, ServeError) as error:
                await self._restore(name)
                reason = getattr(error, "strerror", None) or error
                raise ServeError(f"the document cannot be changed: {reason}") from error
            return status

    async def _restore(self, name: str) -> None:
        """Serve what the document says of `name`, which may have changed meanwhile."""
        old = self._document.get(name)
        if old is None:
            self.reconciler.remove(name)
        else:
            self.reconciler.bring(old)
            await self.reconciler.settled(name)

    def _as_served(self, entry: Adapter, old: Adapter | None) -> Adapter:
        """Return the entry with the digest that serves now, and that of the `old` one among its previous versions."""
        alias = self.fleet.aliases[entry.name]
        current = alias.current.digest
        canary = alias.canary and Canary(version=alias.canary.digest, weight=alias.weight)
        previous = desired.previous([old.digest if old else None, *entry.previous], current)
        return entry.model_copy(update={"digest": current, "canary": canary, "previous": previous})

    def _writable(self) -> None:
        if self.file is None:
            raise ServeError(f"the desired state is at {without_secrets(self._where)}: change it there")
        document_text.check_writable(self._where)

    async def _edit(self, change: Callable[[Document], Document], served: Adapter | None = None) -> None:
        """Write what `change` makes of the document as it is now; what others have changed in it is followed, too.

        `served` is what the change says of an adapter that serves already. Raises ServeError and OSError.
        """

        document = self._document

        def changed(text: str) -> str:
            nonlocal document
            document = change(self._parsed(text))
            return desired.dump(document)

        self._writable()
        async with self._editing:
            # In a thread: it waits for others and for the disk, streams must not.
            _, text = await asyncio.to_thread(document_text.edit, self._where, changed)
            before, self._document, self._text = self._document, document, text
            if served:
                self.reconciler.adopt(served)
        self._follow(before, document)

    def _follow(self, before: Document, document: Document) -> None:
        for gone in before.adapters:
            if document.get(gone.name) is None:
                self.reconciler.remove(gone.name)
        for entry in document.adapters:
            if before.get(entry.name) != entry:
                self.reconciler.bring(entry)

    def _parsed(self, text: str) -> Document:
        """Return the document that a file's text is. Raises BadDocument."""
        if text and text == self._text:
            return self._document
        if not text.strip() and self._document.adapters:
            raise BadDocument(f"{self._where} is empty or gone: write 'adapters: []' to serve none")
        return desired.parse(text, self._where)

    async def _read(self) -> tuple[Document, str]:
        """Return the document as it is now, and its text. Raises ServeError, OSError, httpx.HTTPError and others."""
        if not self._where.startswith(("http://", "https://")):
            text = await asyncio.to_thread(document_text.read, self._where)
            return self._parsed(text), text
        async with httpx.AsyncClient(timeout=10, follow_redirects=True) as client:
            answer = await client.get(self._where, headers={"If-None-Match": self._etag} if self._etag else {})
        if answer.status_code == httpx.codes.NOT_MODIFIED:
            return self._document, self._text
        if not answer.is_success:
            raise BadDocument(f"{self._where} answers with {answer.status_code}")
        document = desired.parse(answer.text, self._where)
        self._etag = answer.headers.get("etag", "")
        return document, answer.text


def _there(entry: Adapter | None, name: str) -> Adapter:
    if entry is None:
        raise KeyError(name)
    return entry


async def _watch(file: Path, due: asyncio.Event) -> None:
    """Set `due` at every change of `file`; its folder is watched: files are replaced, and a ConfigMap's are links."""
    file.parent.mkdir(parents=True, exist_ok=True)
    async for changes in awatch(file.parent, recursive=False):
        if any(Path(path).name in (file.name, "..data") for _, path in changes):
            due.set()
