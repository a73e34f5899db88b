"""Versions of adapters on disk: immutable, named by the digest of their content, complete or not there at all.

    ROOT/lock                   locked by the one server that uses the store
    ROOT/staging/...            publications in progress; emptied when a server starts
    ROOT/versions/HEX/          a LoRA folder as it was published, whose `version_digest` is sha256:HEX: weights,
                                config, record, and those of `adapter_dir.CHAT_FILES` that it has. A digest from before
                                the latter counted names the version without them
    ROOT/sources/HEX            the source of that version, as the document named it
    ROOT/engine/HEX/            that LoRA as engines read it, where they cannot read the version itself (`served`);
                                emptied when a server starts
    ROOT/passing/...            a store of versions that end with the server, as a trainer's policies: removed when a
                                server starts and when it ends, and never flushed to the disk
    ROOT/usage.sqlite           the ledger of usage (`observe.ledger_file`)

The engine reads from here alone. Adapters are copied, not linked: a link to somebody's file would change with the file.
A download of the server itself is in the staging folder already, and is moved.

Which versions are there is known without asking the disk, which may hang. A full disk: versions that nothing needs are
removed, and the publication is tried once more.
"""

import errno
import fcntl
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from astra_serve.adapters.version_files import files_of, named, version_digest
from astra_serve.errors import CannotStore, Damaged, InUse, ServeError
from converter import adapter_dir, atomic
from converter.adapter_dir import AdapterError
from converter.errors import without_secrets

FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK = 2**22  # bytes
PASSING = "passing"


class Store:
    """The versions under `root`, for this process alone.

    Raises InUse where another process uses them, and ServeError where the folder cannot be used.
    """

    def __init__(self, root: Path, *, lasting: bool = True) -> None:
        """A store that is not `lasting` is empty at first, and removed when it is closed."""
        self._lasting = lasting
        self._versions, self._staging, self._sources = root / "versions", root / "staging", root / "sources"
        self._engine = root / "engine"
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
        self.root = root
        self._changing = threading.RLock()  # held while a version appears, or is removed
        self._kept: list[list[str]] = []
        self._ended: list[list[str]] = []  # of these, the ones whose block has ended
        self._spare: set[str] = set()  # versions that nothing needed when `collect` was called last
        try:
            left = (self._staging, self._engine, root / PASSING, *(() if lasting else (self._versions, self._sources)))
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)  # of a server that was killed
            for folder in (self._staging, self._engine, self._versions, self._sources):
                folder.mkdir(exist_ok=True)
            self._there = {f"sha256:{path.name}" for path in self._versions.iterdir()}
            self._source_of = {f"sha256:{path.name}": _text(path) for path in self._sources.iterdir()}
        except OSError as error:
            self._lock.close()
            raise ServeError(f"store {root} cannot be used: {error.strerror}") from error

    def close(self) -> None:
        """Release the store for another process."""
        if not self._lasting:
            shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()

    def passing(self) -> "Store":
        """Return the store of versions that end with this server. Raises ServeError."""
        return Store(self.root / PASSING, lasting=False)

    def staging(self) -> Path:
        """Return a new folder to download an adapter into. Raises CannotStore."""
        try:
            return Path(tempfile.mkdtemp(dir=self._staging))
        except OSError as error:
            raise self.cannot_store(error) from error

    @contextmanager
    def keeping(self) -> Iterator[list[str]]:
        """Yield a list of digests, to be appended to; until the block ends their versions are not removed.

        Neither are they removed by a collection that began before the end (`begin_collection`).
        """
        kept: list[str] = []
        self._kept.append(kept)
        try:
            yield kept
        finally:
            self._spare -= set(kept)
            self._ended.append(kept)

    def begin_collection(self) -> None:
        """Note that what `collect` is to keep is determined now: it includes the versions of blocks that have ended."""
        ended, self._ended = self._ended, []
        self._kept = [kept for kept in self._kept if not any(kept is one for one in ended)]

    def add(
        self,
        folder: Path,
        expected: str | None = None,
        source: str | None = None,
        kept: list[str] | None = None,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> str:
        """Publish the LoRA in `folder`, which came from `source`, and return its digest, which is appended to `kept`.

        A folder of the staging area is moved. `on_bytes` is called with the number of bytes of each block that is read.
        Raises AdapterError, OSError of the folder, CannotStore, and Damaged when the content is not the `expected` one;
        then nothing stays.
        """
        staged, kept = folder.is_relative_to(self._staging), [] if kept is None else kept
        try:
            try:
                return self._add(folder, expected, source, kept, on_bytes)
            except OSError as error:
                if staged or error.errno not in FULL or not self.drop_spare():
                    raise
                return self._add(folder, expected, source, kept, on_bytes)
        except OSError as error:
            ours = error.errno in (*FULL, errno.EROFS) or str(error.filename).startswith(str(self.root))
            raise self.cannot_store(error) if ours else error from error
        finally:
            if staged:
                shutil.rmtree(folder, ignore_errors=True)

    def source(self, digest: str) -> str | None:
        """Return where a version came from, if the store knows it."""
        return self._source_of.get(digest)

    def note_source(self, digest: str, source: str) -> None:
        """Keep where a version of the store came from. Raises OSError."""
        if self._source_of.get(digest) != source:
            if self._lasting:
                with atomic.new_file(self._sources / digest.removeprefix("sha256:")) as file:
                    file.write_text(source, encoding="utf-8")
            self._source_of[digest] = source

    def folder(self, digest: str) -> Path:
        """Return the folder of a version, which may be absent."""
        return self._versions / digest.removeprefix("sha256:")

    def engine_folder(self, digest: str) -> Path:
        """Return the folder for a version as engines read it, which may be absent."""
        return self._engine / digest.removeprefix("sha256:")

    def __contains__(self, digest: str) -> bool:
        """Return whether the store has a version, as far as it knows without asking the disk."""
        return digest in self._there

    def intact(self, digest: str) -> bool:
        """Return whether a version is there as it was published; a damaged one is removed: it can be added again."""
        with self._changing:  # it may be on its way out
            there = self.folder(digest).is_dir()
        if not there:
            self._there.discard(digest)
            return False
        try:
            self.verify(digest)
        except Damaged:
            with suppress(OSError):  # read-only
                self.discard(digest)
            return False
        return True

    def verify(self, digest: str) -> Path:
        """Return the folder of a version after reading all of it. Raises Damaged."""
        folder = self.folder(digest)
        if not folder.is_dir():
            self._there.discard(digest)
            raise Damaged(f"version {digest[:19]} is gone from the store: publish it again")
        try:
            found = version_digest(folder)
        except (AdapterError, OSError) as error:
            raise Damaged(f"version {digest[:19]} cannot be read in the store: {error}") from error
        if found != digest:
            raise Damaged(f"version {digest[:19]} was changed in the store: publish it again")
        return folder

    def discard(self, digest: str) -> None:
        """Remove a version, if it is there. Raises OSError."""
        folder, removed = self.folder(digest), self._staging / digest.removeprefix("sha256:")
        with suppress(FileNotFoundError):
            folder.chmod(0o755)
            folder.rename(removed)  # gone in one step
        shutil.rmtree(removed, ignore_errors=True)
        shutil.rmtree(self.engine_folder(digest), ignore_errors=True)
        self._there.discard(digest)
        self._sources.joinpath(folder.name).unlink(missing_ok=True)
        self._source_of.pop(digest, None)

    def collect(self, keep: Collection[str], newest: int) -> list[str]:
        """Remove all versions but those of `keep` and the `newest` others; return the removed ones. Raises OSError."""
        with self._changing:
            keep = {*keep, *self._kept_now()}
            others = [path for path in self._versions.iterdir() if f"sha256:{path.name}" not in keep]
            others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            digests = [f"sha256:{path.name}" for path in others]
            self._spare = set(digests[:newest])
            for digest in digests[newest:]:
                self.discard(digest)
            return digests[newest:]

    def drop_spare(self) -> bool:
        """Remove the versions that nothing needed when `collect` was called last; return whether there was one."""
        with self._changing:
            spare, self._spare = self._spare - self._kept_now(), set()
            for digest in spare:
                with suppress(OSError):
                    self.discard(digest)
            return bool(spare)

    def _kept_now(self) -> set[str]:
        return {digest for kept in tuple(self._kept) for digest in tuple(kept)}

    def _add(
        self, folder: Path, expected: str | None, source: str | None, kept: list[str], on_bytes: Callable[[int], None]
    ) -> str:
        # A policy is new bytes nearly always: to look for them first would read them once more.
        digest = self._already(folder, expected, on_bytes) if self._lasting else None
        if digest is None:
            digest = self._copied(folder, expected, source, kept, on_bytes)
        kept.append(digest)
        if source:
            self.note_source(digest, source)
        return digest

    def _copied(
        self, folder: Path, expected: str | None, source: str | None, kept: list[str], on_bytes: Callable[[int], None]
    ) -> str:
        """Copy the LoRA in `folder`, check the copy, and publish it."""
        staged = folder.is_relative_to(self._staging)
        copy = folder if staged else Path(tempfile.mkdtemp(dir=self._staging))
        try:
            if not staged:
                adapter_dir.check_readable(folder)
            for name in () if staged else files_of(folder):
                if os.path.lexists(folder / name):
                    _copy(adapter_dir.file_in(folder, name), copy / name, on_bytes)
            adapter_dir.load_lora(copy)  # the copy is checked: the original may change
            digest, with_chat = named(copy, expected)
            self._publish(copy, files_of(copy, with_chat=with_chat), digest, kept)
            return digest
        except AdapterError as error:
            shown = without_secrets(source) if source else str(folder)
            raise type(error)(str(error).replace(str(copy), shown)) from error
        finally:
            if not staged:
                shutil.rmtree(copy, ignore_errors=True)

    def _already(self, source: Path, expected: str | None, on_bytes: Callable[[int], None]) -> str | None:
        """Return the digest of the LoRA in `source` if it is the expected one, and the store has it, intact."""
        try:
            digest, _ = named(source, expected, on_bytes)
            self.verify(digest)
        except (AdapterError, OSError, Damaged):
            return None
        return digest

    def _publish(self, folder: Path, files: Collection[str], digest: str, kept: list[str]) -> None:
        for path in folder.iterdir():
            if path.name not in files or path.is_symlink():
                _remove(path)
                continue
            if self._lasting:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
            path.chmod(0o444)
        kept.append(digest)
        if self.intact(digest):
            return
        folder.chmod(0o755)
        with self._changing:
            try:
                folder.rename(self.folder(digest))
            except OSError:  # another publication of the same content was faster
                if not self.intact(digest):
                    raise
            self._there.add(digest)

    def cannot_store(self, error: OSError) -> CannotStore:
        """Return the error for an operation on the store's own folders that has failed."""
        if error.errno in FULL:
            return CannotStore(f"the disk of the store {self.root} is full: remove adapters, or give it more room")
        return CannotStore(f"the store {self.root} cannot be written: {error.strerror}")


def first_free(parent: Path) -> Store:
    """Return the first of the stores `parent`/0, `parent`/1, ... that no server uses. Raises ServeError.

    A server that starts again finds the versions of itself, or of another server that has ended. The file system must
    have locks that hold on all the machines that share it.
    """
    for number in itertools.count():
        with suppress(InUse):
            return Store(parent / str(number))
    raise AssertionError


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _copy(source: Path, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Copy a file as long as it is now: one that grows does not fill the disk."""
    with source.open("rb") as reading, target.open("wb") as writing:
        left = os.fstat(reading.fileno()).st_size
        while block := reading.read(min(left, BLOCK)):
            writing.write(block)
            on_bytes(len(block))
            left -= len(block)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
