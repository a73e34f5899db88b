"""The desired state as a running server has it: where it is read from, how it is edited, and that it is followed."""

import asyncio
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from watchfiles import awatch

from astra_serve import desired
from astra_serve.desired import Adapter, Canary, Document
from astra_serve.errors import BadDocument, ServeError
from astra_serve.fleet import Fleet
from astra_serve.reconcile import Reconciler, Status

TIMER_S = 10.0  # a changed file or page is seen after this long at the latest


class Control:
    """Follows the document at `where`, a file or a URL, and edits it if it is a file."""

    def __init__(self, where: str, fleet: Fleet, reconciler: Reconciler) -> None:
        self.fleet, self.reconciler = fleet, reconciler
        self.fault: str | None = None  # why the document as it is now is not followed
        self._where = where
        self._document = Document()
        self._etag = ""
        self._editing = asyncio.Lock()  # of the document, for as long as it takes to write it
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # of an adapter, until it serves

    @property
    def file(self) -> Path | None:
        """Return the document's file; None where it is a page somewhere, and only read."""
        return None if self._where.startswith(("http://", "https://")) else Path(self._where)

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
        """Read the document again and apply it if it changed."""
        async with self._editing:
            try:
                document = await self._read()
            except (ServeError, httpx.HTTPError, OSError) as error:
                self.fault = str(error)
                return
            self.fault = None
            if document is not None:
                self._document = document
                self.reconciler.apply(document)

    async def publish(self, name: str, source: str, **settings: Any) -> Status:
        """Let `name` mean what is at `source`, and return its status when it is served, or failed.

        What it meant before becomes the first of its previous versions. The document is as before where it failed.
        Raises ServeError.
        """
        old = self._document.get(name)
        entry = (old or Adapter(name=name, source=source)).model_copy(
            update={"source": source, "digest": None, "canary": None, **settings}
        )
        return await self._try(Adapter.model_validate(entry.model_dump()))

    async def rollback(self, name: str, digest: str | None = None) -> Status:
        """Let `name` mean its previous version again, or the one with `digest`. Raises ServeError."""
        entry = self._entry(name)
        target = digest or next(iter(entry.previous), None)
        if target is None or target not in entry.previous:
            known = ", ".join(entry.previous) or "none"
            raise ServeError(f"{name!r} has no such previous version; there are: {known}")
        return await self._try(entry.model_copy(update={"source": target, "digest": target, "canary": None}))

    async def change(self, name: str, **settings: Any) -> Status:
        """Change settings of `name`, as pin or canary. Raises ServeError."""
        entry = self._entry(name).model_dump() | settings
        return await self._try(Adapter.model_validate(entry))

    async def remove(self, name: str) -> None:
        """Serve nothing under `name` any more. Raises ServeError."""
        self._entry(name)
        async with self._editing:
            await self._write(self._document.without(name))

    def _entry(self, name: str) -> Adapter:
        entry = self._document.get(name)
        if entry is None:
            raise KeyError(name)
        return entry

    async def _try(self, entry: Adapter) -> Status:
        """Bring `entry` up, write it into the document once it serves, and return its status."""
        self._writable()
        async with self._changing[entry.name]:
            old = self._document.get(entry.name)
            self.reconciler.bring(entry)
            status = await self.reconciler.settled(entry.name)
            if status.entry != entry:
                raise ServeError(f"the document changed {entry.name!r} meanwhile: try again")
            async with self._editing:
                if status.state == "failed":
                    self.reconciler.apply(self._document)
                else:
                    await self._write(self._document.with_adapter(self._as_served(entry, old)))
                    status = await self.reconciler.settled(entry.name)
        return status

    def _as_served(self, entry: Adapter, old: Adapter | None) -> Adapter:
        """Return the entry with the digest that serves now, and that of the `old` one among its previous versions."""
        alias = self.fleet.aliases[entry.name]
        current = alias.current.digest
        canary = alias.canary and Canary(version=alias.canary.digest, weight=alias.weight)
        before = [old.digest] if old and old.digest else []
        previous = [d for d in dict.fromkeys([*before, *entry.previous]) if d != current]
        return entry.model_copy(update={"digest": current, "canary": canary, "previous": previous[:8]})

    def _writable(self) -> None:
        if self.file is None:
            raise ServeError(f"the desired state is at {self._where}: change it there")

    async def _write(self, document: Document) -> None:
        self._writable()
        assert self.file is not None
        await asyncio.to_thread(desired.write, document, self.file)  # it waits for the disk; streams must not
        self._document = document
        self.reconciler.apply(document)

    async def _read(self) -> Document | None:
        """Return the document if it changed. Raises ServeError, OSError and httpx.HTTPError."""
        if self.file is not None:
            text = await asyncio.to_thread(self.file.read_text, encoding="utf-8") if self.file.exists() else ""
        else:
            async with httpx.AsyncClient(timeout=10, follow_redirects=True) as client:
                answer = await client.get(self._where, headers={"If-None-Match": self._etag} if self._etag else {})
            if answer.status_code == httpx.codes.NOT_MODIFIED:
                return None
            if not answer.is_success:
                raise BadDocument(f"{self._where} answers with {answer.status_code}")
            self._etag, text = answer.headers.get("etag", ""), answer.text
        document = desired.parse(text, self._where)
        return None if document == self._document else document


async def _watch(file: Path, due: asyncio.Event) -> None:
    """Set `due` at every change of `file`; its folder is watched: files are replaced, and a ConfigMap's are links."""
    file.parent.mkdir(parents=True, exist_ok=True)
    async for changes in awatch(file.parent, recursive=False):
        if any(Path(path).name in (file.name, "..data") for _, path in changes):
            due.set()
