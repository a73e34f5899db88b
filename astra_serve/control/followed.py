"""A document that one server follows: where it is, its text, and what the last good text says.

It is read again when its file changes, and after `FOLLOW_S` at the latest. A text that cannot be read or understood
changes nothing: what was followed before is followed on, and `fault` says why.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import httpx
from watchfiles import awatch

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.fetch import Sources
from astra_serve.document import document_text
from astra_serve.errors import BadDocument
from converter.errors import first_line, without_secrets

P = ParamSpec("P")
T = TypeVar("T")
Content = TypeVar("Content")
ANSWER_S = 10.0  # for a page to answer, and between two parts of it
FOLLOW_S = 5.0  # a changed document is read after this time at the latest
logger = logging.getLogger("vllm.astra_serve")


async def follow(document: "Followed[Content]", refresh: Callable[[], Awaitable[None]], clock: Clock) -> None:
    """Call `refresh` now, at each change of the document's file, and every FOLLOW_S, until cancelled."""
    due = asyncio.Event()
    async with asyncio.TaskGroup() as watching:
        if document.file:
            watching.create_task(_watch(document.file, due))
        while True:
            due.clear()
            await refresh()
            await clock.wait(due, clock.now() + FOLLOW_S)


class Followed(ABC, Generic[Content]):
    """The document at `where`, a file or a URL.

    A text is parsed once, in a thread, whether it has a fault or not.
    """

    def __init__(self, where: str, content: Content, sources: Sources | None = None, page_s: float = 60.0) -> None:
        """`content` counts until the first text is read.

        A thread of `sources` reads it: the end of a server waits for none. A page is read for at most `page_s`.
        """
        self._sources = sources or Sources()
        self.content = content
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
                self.content, self._text = await self._now()
            except Exception as error:  # of the file, the page or the network
                self.fault = first_line(error)
                return False
            self.fault, self.read_once = None, True
            return True

    @abstractmethod
    def _parse(self, text: str) -> Content:
        """Return what a text says. Raises BadDocument."""

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._sources.threads.run("the document", function, *args, **kwargs)

    async def _now(self) -> tuple[Content, str]:
        """Return the document as it is now, and its text. Raises ServeError, OSError, httpx.HTTPError and others."""
        if not self._where.startswith(("http://", "https://")):
            return await self._in_thread(lambda: self._parsed(document_text.read(self._where)))
        async with asyncio.timeout(self._page_s):
            data, etag = await self._page()
        if data is None:
            return self.content, self._text
        found = await self._in_thread(lambda: self._parsed(document_text.decoded(data, self._where)))
        self._etag = etag
        return found

    def _parsed(self, text: str) -> tuple[Content, str]:
        if text == self._text and text:
            return self.content, text
        if text and self._faulty and self._faulty[0] == text:  # an empty one is a fault only where there were entries
            raise BadDocument(self._faulty[1])
        try:
            return self._parse(text), text
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


async def _watch(file: Path, due: asyncio.Event) -> None:
    """Set `due` at every change of `file`; its folder is watched: files are replaced, and a ConfigMap's are links."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        async for changes in awatch(file.parent, recursive=False):
            if any(Path(path).name in (file.name, "..data") for _, path in changes):
                due.set()
    except OSError as error:  # no more watches, or a file system without them
        logger.warning("changes of %s are seen after %.0f s: %s", file, FOLLOW_S, error)
