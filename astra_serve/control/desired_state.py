"""The document that one server follows: where it is, its text and its entries as they were read or written last."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import httpx

from astra_serve.adapters.fetch import Sources
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Document
from astra_serve.document.entry_text import with_entry
from astra_serve.errors import BadDocument, ServeError
from converter.errors import first_line, without_secrets

P = ParamSpec("P")
T = TypeVar("T")
ANSWER_S = 10.0  # for a page to answer, and between two parts of it


class DesiredState:
    """The document at `where`, a file or a URL; only a file is edited.

    A text is parsed once, in a thread, whether it has a fault or not.
    """

    def __init__(self, where: str, sources: Sources | None = None, page_s: float = 60.0) -> None:
        """A thread of `sources` reads it: the end of a server waits for none. A page is read for at most `page_s`."""
        self._sources = sources or Sources()
        self.document = Document()
        self.fault: str | None = None  # why the text as it is now is not followed
        self.read_once = False
        self._where, self._page_s, self._text, self._etag = where, page_s, "", ""
        self._faulty: tuple[str, str] | None = None  # the text that was parsed last, if it has a fault, and the fault
        self._busy = asyncio.Lock()  # one read or write at a time

    @property
    def file(self) -> Path | None:
        """Return the document's file; None where it is at a URL, and only read."""
        return None if "://" in self._where else Path(self._where)

    def describe(self) -> dict[str, str | None]:
        """Return where the document is, the digest of the text that is followed, and the fault of the present text."""
        where = str(self.file.absolute()) if self.file else without_secrets(self._where)
        followed = document_text.digest(self._text) if self.read_once else None
        return {"where": where, "digest": followed, "fault": self.fault}

    async def read(self) -> bool:
        """Read the document again; return whether it can be followed. Otherwise `fault` says why not."""
        async with self._busy:
            try:
                self.document, self._text = await self._now()
            except Exception as error:  # of the file, the page or the network
                self.fault = first_line(error)
                return False
            self.fault, self.read_once = None, True
            return True

    def check_writable(self) -> None:
        """Raise ServeError where the document can only be read."""
        if self.file is None:
            raise ServeError(f"the desired state is at {without_secrets(self._where)}: change it there")
        document_text.check_writable(self._where)

    async def replace(self, name: str, old: Adapter | None, new: Adapter | None) -> None:
        """Write the entry `new` in place of `old`, and read the changes of others meanwhile; None is no entry.

        Raises ServeError, Conflict where the document has another entry of this name; then nothing is written.
        """
        found = self.document

        def change(text: str) -> str:
            nonlocal found
            self._check_not_gone(text)
            known = self.document if text == self._text and text else None
            found, text = with_entry(text, self._where, name, old, new, known)
            return text

        self.check_writable()
        async with self._busy:
            try:  # in a thread: it waits for other writers and for the disk
                _, self._text = await self._in_thread(document_text.edit, self._where, change)
            except OSError as error:
                raise ServeError(f"the document cannot be changed: {error.strerror or error}") from error
            self.document = found

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._sources.threads.run("the document", function, *args, **kwargs)

    def _check_not_gone(self, text: str) -> None:
        if not text.strip() and self.document.adapters:
            raise BadDocument(f"{self._where} is empty or gone: write 'adapters: []' to serve none")

    async def _now(self) -> tuple[Document, str]:
        """Return the document as it is now, and its text. Raises ServeError, OSError, httpx.HTTPError and others."""
        if not self._where.startswith(("http://", "https://")):
            return await self._in_thread(lambda: self._parsed(document_text.read(self._where)))
        async with asyncio.timeout(self._page_s):
            data, etag = await self._page()
        if data is None:
            return self.document, self._text
        found = await self._in_thread(lambda: self._parsed(document_text.decoded(data, self._where)))
        self._etag = etag
        return found

    def _parsed(self, text: str) -> tuple[Document, str]:
        if text == self._text and text:
            return self.document, text
        if self._faulty and self._faulty[0] == text:
            raise BadDocument(self._faulty[1])
        self._check_not_gone(text)
        try:
            return desired.parse(text, self._where), text
        except BadDocument as error:
            self._faulty = text, str(error)
            raise

    async def _page(self) -> tuple[bytes | None, str]:
        """Return the bytes of a page and its ETag; None where it is the same. Raises ServeError, httpx.HTTPError."""
        asked = {"If-None-Match": self._etag} if self._etag else {}
        async with (
            httpx.AsyncClient(timeout=ANSWER_S, follow_redirects=True) as client,
            client.stream("GET", self._where, headers=asked) as answer,
        ):
            if answer.status_code == httpx.codes.NOT_MODIFIED:
                return None, self._etag
            if not answer.is_success:
                raise BadDocument(f"{without_secrets(self._where)} answers with {answer.status_code}")
            data = bytearray()
            async for block in answer.aiter_bytes():
                data += block
                if len(data) > document_text.MAX_BYTES:
                    raise document_text.too_large(self._where)
            return bytes(data), answer.headers.get("etag", "")
