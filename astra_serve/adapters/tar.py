"""An adapter that arrives as a tar: its files, written into a folder while they are received.

A tar may have the files of a version and nothing else: regular files, each once, each of at most its size, in any
order; `./NAME` is NAME, and an entry of the folder itself is skipped. Everything else is refused at its header, before
its bytes are received: other names and paths, links, devices, sparse files, and extended headers (pax, long names),
which no file of an adapter needs. `tar --format=ustar` writes none.

The end of the archive must be there. `tarfile.TarFile` accepts a cut archive as a complete one, without the files that
are missing, and reads extended headers of any size into memory; here only its headers are parsed by `tarfile`.
"""

import asyncio
import re
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from astra_serve.adapters.download import too_large
from astra_serve.adapters.progress import largest_files
from astra_serve.errors import BadUpload
from converter.adapter_dir import LORA_WEIGHTS, MAX_JSON_BYTES, MAX_SHARDS, PICKLED_WEIGHTS, SHARD, WEIGHTS_INDEX

BLOCK = tarfile.BLOCKSIZE  # 512 bytes
WRITTEN = 2**20  # bytes at a time
MAX_ENTRIES = MAX_SHARDS + 32
MAX_PADDING = 2**20  # bytes after the end of the archive
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")  # first bytes of gzip, bzip2, xz and zstd


def largest_tar(max_bytes: int) -> int:
    """Return the most bytes of a tar, with all its files at their largest."""
    return sum(largest_files(max_bytes).values()) + MAX_JSON_BYTES + 2 * BLOCK * MAX_ENTRIES + MAX_PADDING


async def receive(
    pieces: AsyncIterator[bytes], folder: Path, max_bytes: int, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Write the files of a tar into `folder`, which is empty; its weights have at most `max_bytes` bytes.

    `on_bytes` is called with the number of bytes of each piece. Raises BadUpload, OSError of the folder, and the errors
    of `pieces`; the folder has a part of the files then.
    """
    body, left, seen = _Body(pieces, on_bytes), max_bytes, set[str]()
    for _ in range(MAX_ENTRIES):
        header = _header(await body.exactly(BLOCK))
        if header is None:
            await body.drain()
            return
        if header.isdir() and header.name in ("", ".") and not header.size:
            continue
        name = _checked(header, left)
        if name in seen:
            raise BadUpload(f"the tar has {name} twice: each file once")
        seen.add(name)
        if name == LORA_WEIGHTS or re.fullmatch(SHARD, name):
            left -= header.size
        with (folder / name).open("xb") as file:
            async for block in body.blocks(header.size):
                await asyncio.to_thread(file.write, block)
        await body.exactly(-header.size % BLOCK)
    raise BadUpload(f"the tar has more than {MAX_ENTRIES} entries: send the files of one adapter")


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Return the header of an entry, None at the end of the archive. Raises BadUpload."""
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if block.startswith(COMPRESSED):
            raise BadUpload("the body is compressed: send a plain tar") from error
        raise BadUpload(f"the body is no tar of an adapter: {error}") from error


def _checked(header: tarfile.TarInfo, weights_left: int) -> str:
    """Return the name of a file that a version may have. Raises BadUpload."""
    name = header.name.removeprefix("./")
    shown = ascii(header.name)[:100]
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        extended = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, *tarfile.GNU_TYPES)
        help_ = "make it with tar --format=ustar" if extended else "send the files themselves"
        raise BadUpload(f"the tar has {shown}, which is no regular file (type {ascii(header.type)[1:]}): {help_}")
    if name == PICKLED_WEIGHTS:
        raise BadUpload(f"the tar has {name}, a pickle, which can run code: convert it with astra-convert first")
    most = {**largest_files(weights_left), WEIGHTS_INDEX: MAX_JSON_BYTES}
    limit = weights_left if re.fullmatch(SHARD, name) else most.get(name)
    if limit is None:
        raise BadUpload(f"the tar has {shown}, which is no file of an adapter: send {', '.join(most)} alone")
    if not 0 <= header.size <= limit:
        raise BadUpload(too_large(name, limit), 413)
    return name


class _Body:
    """The bytes of a body, in the sizes that are asked for."""

    def __init__(self, pieces: AsyncIterator[bytes], on_bytes: Callable[[int], None]) -> None:
        self._pieces, self._on_bytes, self._rest = pieces, on_bytes, b""

    async def exactly(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises BadUpload where the body ends before."""
        return b"".join([block async for block in self.blocks(size)])

    async def blocks(self, size: int) -> AsyncIterator[bytes]:
        """Yield the next `size` bytes in blocks. Raises BadUpload where the body ends before."""
        pieces: list[bytes] = []
        waiting = 0
        while size > waiting:
            piece = await self._next()
            if not piece:
                raise BadUpload("the tar is cut off: send all of it")
            taken, self._rest = piece[: size - waiting], piece[size - waiting :]
            pieces.append(taken)
            waiting += len(taken)
            if waiting >= WRITTEN:
                yield b"".join(pieces)
                size, waiting = size - waiting, 0
                pieces.clear()
        if waiting:
            yield b"".join(pieces)

    async def drain(self) -> None:
        """Receive the rest, which is padding. Raises BadUpload where there is more of it than any program writes."""
        size = 0
        while piece := await self._next():
            size += len(piece)
            if size > MAX_PADDING:
                raise BadUpload("the body goes on after the end of its tar: send one tar")

    async def _next(self) -> bytes:
        """Return the rest of the last piece, or the next one; empty at the end."""
        piece, self._rest = self._rest, b""
        while not piece:
            try:
                piece = await anext(self._pieces)
            except StopAsyncIteration:
                return b""
            self._on_bytes(len(piece))
        return piece
