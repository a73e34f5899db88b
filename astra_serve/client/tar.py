"""An adapter folder as a tar, which is made while it is sent: `publish` with `upload`."""

import asyncio
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from astra_serve.errors import BadUpload

PIECE = 2**18  # bytes
END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass
class Tar:
    """The files of an adapter, and how many bytes of their tar were taken so far."""

    files: tuple[tuple[str, Path, int], ...]  # name, file and size
    sent: int = 0

    @property
    def size(self) -> int:
        """Return the bytes of the tar."""
        block = tarfile.BLOCKSIZE
        return sum(block + size + -size % block for _, _, size in self.files) + len(END)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the tar in pieces. Raises OSError, and BadUpload where a file changes meanwhile."""
        self.sent = 0
        for piece in self._pieces():
            yield piece
            self.sent += len(piece)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the tar in pieces; files are read in a thread. Raises as `__iter__`."""
        found = iter(self)
        while piece := await asyncio.to_thread(next, found, b""):
            yield piece

    def _pieces(self) -> Iterator[bytes]:
        for name, file, size in self.files:
            header = tarfile.TarInfo(name)
            header.size = left = size
            yield header.tobuf(tarfile.GNU_FORMAT)
            with file.open("rb") as stream:
                while left:
                    piece = stream.read(min(left, PIECE))
                    if not piece:
                        raise BadUpload(f"{file} became shorter while it was sent: publish it again")
                    yield piece
                    left -= len(piece)
            if padding := bytes(-size % tarfile.BLOCKSIZE):
                yield padding
        yield END


def of_folder(where: str) -> Tar:
    """Return the tar of the files in a folder that belong to a version. Raises BadUpload where it is no adapter."""
    from converter import adapter_dir  # which imports torch
    from converter.adapter_dir import CHAT_FILES, CONFIG, PROVENANCE

    folder = Path(where)
    if not folder.is_dir():
        raise BadUpload(f"an upload sends a folder of this machine, and {where} is none")
    try:
        adapter_dir.check_readable(folder)
        optional = [name for name in (PROVENANCE, *CHAT_FILES) if (folder / name).exists()]
        names = [CONFIG, *optional, *adapter_dir.weight_files(folder)]
        files = [(name, adapter_dir.file_in(folder, name)) for name in names]
        return Tar(tuple((name, file, file.stat().st_size) for name, file in files))
    except (adapter_dir.AdapterError, OSError) as error:
        raise BadUpload(str(error)) from error
