"""Versions of adapters on disk: immutable, named by the digest of their content, complete or not there at all.

    ROOT/lock                   held by the one server that uses the store
    ROOT/staging/...            what is being published; emptied at the start
    ROOT/versions/HEX/          a LoRA folder whose `version_digest` is sha256:HEX

The engine reads from here alone. What is published is copied: a link to somebody's file would change with it. What
the server itself downloaded lies in the staging folder already, and is moved.
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
from converter import adapter_dir
from converter.adapter_dir import CONFIG, LORA_WEIGHTS, PROVENANCE, AdapterError

FILES = (LORA_WEIGHTS, CONFIG, PROVENANCE)


class Store:
    """The versions under `root`, for this process alone.

    Raises InUse where another process has them, and ServeError where they cannot be had.
    """

    def __init__(self, root: Path) -> None:
        self._versions, self._staging = root / "versions", root / "staging"
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
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
        shutil.rmtree(self._staging, ignore_errors=True)  # what a killed server was publishing
        self._staging.mkdir()

    def close(self) -> None:
        """Let another process have the store."""
        self._lock.close()

    def staging(self) -> Path:
        """Return a new folder to download an adapter into."""
        return Path(tempfile.mkdtemp(dir=self._staging))

    def forget(self, folder: Path) -> None:
        """Remove a folder that was staged, and nothing else."""
        if folder.is_relative_to(self._staging):
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, source: Path, expected: str | None = None) -> str:
        """Publish the LoRA in `source` and return its digest.

        Raises AdapterError, and Damaged when the content is not the `expected` one; then nothing stays.
        """
        ours = source.is_relative_to(self._staging)
        folder = source if ours else self.staging()
        try:
            there = self._already(source)
            if there is not None and _is(expected, there, source):
                return there
            if not ours:
                for name in FILES:
                    if (source / name).is_file():
                        shutil.copyfile(adapter_dir.file_in(source, name), folder / name)
            adapter_dir.load_lora(folder)  # what is copied is what is checked
            digest = version_digest(folder)
            if not _is(expected, digest, folder):
                raise Damaged(f"its digest is {digest}, not {expected}")
            self._publish(folder, digest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return digest

    def folder(self, digest: str) -> Path:
        """Return where a version is, whether it is there or not."""
        return self._versions / digest.removeprefix("sha256:")

    def __contains__(self, digest: str) -> bool:
        return self.folder(digest).is_dir()

    def whole(self, digest: str) -> bool:
        """Whether a version is there as it was published; one that is not is removed, so that it can be published."""
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

    def collect(self, keep: Collection[str], newest: int) -> list[str]:
        """Remove all versions but those of `keep` and the `newest` others; return what was removed."""
        others = [path for path in self._versions.iterdir() if f"sha256:{path.name}" not in keep]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[newest:]:
            self.discard(f"sha256:{path.name}")
        return [f"sha256:{path.name}" for path in others[newest:]]

    def _already(self, source: Path) -> str | None:
        """Return the digest of `source` where the store has that version already, and whole."""
        try:
            digest = version_digest(source)
            self.verify(digest)
        except (AdapterError, OSError, Damaged):
            return None
        return digest

    def _publish(self, folder: Path, digest: str) -> None:
        for path in folder.iterdir():
            if path.name not in FILES or path.is_symlink():
                _remove(path)
                continue
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            path.chmod(0o444)
        if self.whole(digest):
            return
        folder.chmod(0o755)
        try:
            folder.rename(self.folder(digest))
        except OSError:  # others were publishing the same
            if not self.whole(digest):
                raise


def first_free(parent: Path) -> Store:
    """Return the first of the stores `parent`/0, `parent`/1, ... that no server has. Raises ServeError.

    A server that starts again finds what it, or another one that is gone, had in there. The file system must have locks
    that hold on all the machines that share it.
    """
    for number in itertools.count():
        with suppress(InUse):
            return Store(parent / str(number))
    raise AssertionError


def version_digest(folder: Path) -> str:
    """Return the digest of all that makes a version: weights, config and, where there is one, its record and probe.

    Raises AdapterError and OSError.
    """
    return adapter_dir.digest([adapter_dir.file_in(folder, name) for name in FILES if (folder / name).exists()])


def _is(expected: str | None, digest: str, folder: Path) -> bool:
    """Whether `folder`, of this digest, is what was expected: by it, or by the digest that an adapter has of itself."""
    return expected in (None, digest) or expected == adapter_dir.lora_digest(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
