"""Versions of adapters on disk: immutable, named by the digest of their content, complete or not there at all.

    ROOT/lock                   locked by the one server that uses the store
    ROOT/staging/...            publications in progress; emptied when a server starts
    ROOT/versions/HEX/          a LoRA folder whose `version_digest` is sha256:HEX
    ROOT/sources/HEX            the source of that version, as the document named it

The engine reads from here alone. Adapters are copied, not linked: a link to somebody's file would change with the file.
A download of the server itself is in the staging folder already, and is moved.
"""

import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from astra_serve.errors import Damaged, InUse, ServeError
from converter import adapter_dir, atomic
from converter.adapter_dir import CONFIG, LORA_WEIGHTS, PROVENANCE, AdapterError

FILES = (LORA_WEIGHTS, CONFIG, PROVENANCE)


class Store:
    """The versions under `root`, for this process alone.

    Raises InUse where another process uses them, and ServeError where the folder cannot be used.
    """

    def __init__(self, root: Path) -> None:
        self._versions, self._staging, self._sources = root / "versions", root / "staging", root / "sources"
        try:
            for folder in (self._versions, self._sources):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = (root / "lock").open("w")
        except OSError as error:
            raise ServeError(f"store {root} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if not isinstance(error, BlockingIOError):
                raise ServeError(f"store {root} cannot be locked: {error.strerror}") from error
            raise InUse(f"store {root} is in use by another server: give each its own --store") from error
        shutil.rmtree(self._staging, ignore_errors=True)  # left by a server that was killed
        self._staging.mkdir()

    def close(self) -> None:
        """Release the store for another process."""
        self._lock.close()

    def staging(self) -> Path:
        """Return a new folder to download an adapter into."""
        return Path(tempfile.mkdtemp(dir=self._staging))

    def add(self, folder: Path, expected: str | None = None, source: str | None = None) -> str:
        """Publish the LoRA in `folder`, which came from `source`, and return its digest.

        A folder of the staging area is moved. Raises AdapterError, and Damaged when the content is not the `expected`
        one; then nothing stays.
        """
        staged = folder.is_relative_to(self._staging)
        copy = folder if staged else self.staging()
        try:
            digest = self._already(folder)
            if digest is None or not _is(expected, digest, folder):
                if not staged:
                    for name in FILES:
                        if (folder / name).is_file():
                            shutil.copyfile(adapter_dir.file_in(folder, name), copy / name)
                adapter_dir.load_lora(copy)  # the copy is checked: the original may change
                digest = version_digest(copy)
                if not _is(expected, digest, copy):
                    raise Damaged(f"its digest is {digest}, not {expected}")
                self._publish(copy, digest)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        if source:
            with atomic.new_file(self._source(digest)) as file:
                file.write_text(source, encoding="utf-8")
        return digest

    def source(self, digest: str) -> str | None:
        """Return where a version came from, if the store knows it."""
        try:
            return self._source(digest).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def folder(self, digest: str) -> Path:
        """Return the folder of a version, which may be absent."""
        return self._versions / digest.removeprefix("sha256:")

    def __contains__(self, digest: str) -> bool:
        return self.folder(digest).is_dir()

    def intact(self, digest: str) -> bool:
        """Return whether a version is there as it was published; a damaged one is removed: it can be added again."""
        if digest not in self:
            return False
        try:
            self.verify(digest)
        except Damaged:
            self.discard(digest)
            return False
        return True

    def verify(self, digest: str) -> Path:
        """Return the folder of a version after reading all of it. Raises Damaged."""
        folder = self.folder(digest)
        if digest not in self:
            raise Damaged(f"version {digest[:19]} is gone from the store: publish it again")
        try:
            found = version_digest(folder)
        except (AdapterError, OSError) as error:
            raise Damaged(f"version {digest[:19]} cannot be read in the store: {error}") from error
        if found != digest:
            raise Damaged(f"version {digest[:19]} was changed in the store: publish it again")
        return folder

    def discard(self, digest: str) -> None:
        """Remove a version, if it is there."""
        folder = self.folder(digest)
        if folder.is_dir():
            folder.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
        self._source(digest).unlink(missing_ok=True)

    def collect(self, keep: Collection[str], newest: int) -> list[str]:
        """Remove all versions but those of `keep` and the `newest` others; return the removed ones."""
        others = [path for path in self._versions.iterdir() if f"sha256:{path.name}" not in keep]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[newest:]:
            self.discard(f"sha256:{path.name}")
        return [f"sha256:{path.name}" for path in others[newest:]]

    def _already(self, source: Path) -> str | None:
        """Return the digest of the LoRA in `source` if the store has that version, intact."""
        try:
            digest = version_digest(source)
            self.verify(digest)
        except (AdapterError, OSError, Damaged):
            return None
        return digest

    def _source(self, digest: str) -> Path:
        return self._sources / digest.removeprefix("sha256:")

    def _publish(self, folder: Path, digest: str) -> None:
        for path in folder.iterdir():
            if path.name not in FILES or path.is_symlink():
                _remove(path)
                continue
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            path.chmod(0o444)
        if self.intact(digest):
            return
        folder.chmod(0o755)
        try:
            folder.rename(self.folder(digest))
        except OSError:  # another publication of the same content was faster
            if not self.intact(digest):
                raise


def first_free(parent: Path) -> Store:
    """Return the first of the stores `parent`/0, `parent`/1, ... that no server uses. Raises ServeError.

    A server that starts again finds the versions of itself, or of another server that has ended. The file system must
    have locks that hold on all the machines that share it.
    """
    for number in itertools.count():
        with suppress(InUse):
            return Store(parent / str(number))
    raise AssertionError


def version_digest(folder: Path) -> str:
    """Return the digest over the files of a version: weights, config and, where there is one, its record and probe.

    Raises AdapterError and OSError.
    """
    return adapter_dir.digest([adapter_dir.file_in(folder, name) for name in FILES if (folder / name).exists()])


def _is(expected: str | None, digest: str, folder: Path) -> bool:
    """Return whether the LoRA in `folder` has the expected digest: of the version, or of the weights alone."""
    return expected in (None, digest) or expected == adapter_dir.lora_digest(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
