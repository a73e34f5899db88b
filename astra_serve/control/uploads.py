"""A publish whose bytes are in the request: receive -> store -> prove -> copy to the target -> write -> follow.

    receive   the tar's files are written into the staging area of the store; nothing of it is held in memory
    store     the files are named by their digest; the version is in this server's store then, as any other
    prove     as every publish: admission, load and probe
    copy      the version is copied to the target (`--upload-to`), under its digest; that copy is the entry's source
    write     from here on, the publish of that source (`control`)

A version that is refused is never copied. A failure before the write leaves nothing in the staging area, which is
emptied also when a server starts. The copy stays if the write fails: the next upload of the same version uses it.
At most `AT_A_TIME` bodies are received at a time, others wait. A body may take as long as its bytes arrive
(`adapters.progress`). A client that disconnects before the end of its body has published nothing; later it cancels
nothing.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect

from astra_serve.adapters.fetch import Sources
from astra_serve.adapters.progress import Progress
from astra_serve.adapters.store import Store
from astra_serve.adapters.tar import largest_tar, receive
from astra_serve.adapters.upload_target import UploadTarget
from astra_serve.control.control import Control
from astra_serve.document import desired
from astra_serve.errors import BadUpload, CannotFetch, CannotStore, Damaged, NotPublished, ServeError
from converter.adapter_dir import AdapterError

AT_A_TIME = 4


class Uploads:
    """Publishes adapters that clients send, for one server."""

    def __init__(self, control: Control, store: Store, sources: Sources, target: UploadTarget | None) -> None:
        """Without a `target` every upload is refused."""
        self._control, self._store, self._sources, self._target = control, store, sources, target
        self._receiving = asyncio.Semaphore(AT_A_TIME)

    async def publish(
        self, name: str, body: AsyncIterator[bytes], length: int, digest: str | None = None, **settings: Any
    ) -> None:
        """Serve the adapter whose tar is `body` as `name`; `length` is that of its header, 0 where it has none.

        `digest` refuses any other content. Raises the errors of `Control.publish`, and before the body is received
        ServeError where this server takes no uploads, BadDocument, and BadUpload for a body that is too large.
        """
        target = self._checked(name, length)
        desired.entry({"name": name, "source": target.source(""), "digest": digest, **settings})
        self._control.state.check_writable()
        with self._store.keeping() as kept:
            try:
                stored = await self._stored(body, digest, kept)
            except (CannotStore, Damaged, NotPublished) as error:
                raise NotPublished(f"{name!r} was not published: {error}") from error
            source = target.source(stored)

            async def copy() -> None:
                await self._copied(target, stored)

            await self._control.publish(name, source, stored, copy, **settings)
            with suppress(OSError):  # it serves already
                await asyncio.to_thread(self._store.note_source, stored, source)

    def _checked(self, name: str, length: int) -> UploadTarget:
        if self._target is None:
            raise ServeError(
                f"this server takes no uploads: start it with --upload-to, a shared folder or s3://..., or publish "
                f"{name!r} from a source that it can read"
            )
        most = largest_tar(self._sources.limits.max_bytes)
        if length > most:
            raise BadUpload(f"the body has {length} bytes: an adapter of this base has at most {most}", 413)
        return self._target

    async def _stored(self, body: AsyncIterator[bytes], digest: str | None, kept: list[str]) -> str:
        """Return the digest of the received version, which the store has then, and keeps."""
        async with self._receiving:
            folder = await asyncio.to_thread(self._store.staging)
            try:
                await self._received(body, folder)
                return await self._sources.read(str(folder), self._store.add, folder, digest, None, kept)
            except OSError as error:
                raise self._store.cannot_store(error) from error
            except AdapterError as error:  # which names the folder
                raise NotPublished(str(error).replace(str(folder), "the upload")) from error
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _received(self, body: AsyncIterator[bytes], folder: Path) -> None:
        progress, total = Progress(self._sources.limits, time.monotonic()), 0

        def on_bytes(number: int) -> None:
            nonlocal total
            total += number
            progress.note(total, time.monotonic())

        receiving = receive(body, folder, self._sources.limits.max_bytes, on_bytes)
        try:
            await self._sources.watched("the body", receiving, progress)
        except CannotFetch as error:
            raise BadUpload(str(error), 408) from error
        except ClientDisconnect as error:
            raise BadUpload("the client has disconnected") from error

    async def _copied(self, target: UploadTarget, digest: str) -> None:
        try:
            await self._sources.read(target.source(digest), target.put, self._store.folder(digest), digest)
        except CannotFetch as error:
            raise CannotStore("it cannot be copied to --upload-to: no bytes are taken any more") from error
