"""The place to which uploaded adapters are copied, so that every replica can fetch them: `--upload-to`.

    ROOT/HEX/                   the files of the version sha256:HEX; never changed, and never removed by a server
    ROOT/.uploading-X/          a copy in progress, in a folder; renamed to HEX when it is complete
    ROOT/.uploading-X.lock      locked by the process that writes it

In an object store the config is written last: a version without its config is no adapter. The objects that a failed
copy has written are removed. A folder that a killed server left is removed by the next server that starts, if the file
system has locks; in an object store the next upload of the same version completes its objects.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from astra_serve.adapters.fetch import local_path
from astra_serve.adapters.store import BLOCK
from astra_serve.adapters.version_files import files_of, version_digest
from astra_serve.errors import CannotStore, ServeError
from converter.adapter_dir import CONFIG, AdapterError
from converter.errors import first_line

PARTIAL = ".uploading-"

OnBytes = Callable[[int], None]


class UploadTarget:
    """A folder that all replicas see, or a prefix of an object store."""

    def __init__(self, root: str) -> None:
        """`root` is a folder, file:///... or a URL that fsspec can write. Raises ServeError for any other."""
        if not root or "::" in root or "@" in root or "?" in root or root.startswith(("hf://", "http://", "https://")):
            raise ServeError(
                "--upload-to takes a folder that every replica sees, or a URL such as s3://bucket/prefix; its "
                "credentials come from the environment"
            )
        folder = local_path(root)
        self._folder = folder.expanduser().absolute() if folder else None
        self._root = (str(self._folder) if self._folder and "://" not in root else root).rstrip("/")
        if self._folder is None:
            _filesystem(self._root)

    @property
    def folder(self) -> Path | None:
        """Return the folder; None for an object store."""
        return self._folder

    def source(self, digest: str) -> str:
        """Return the source of a version, as the document names it."""
        return f"{self._root}/{digest.removeprefix('sha256:')}"

    def put(self, version: Path, digest: str, on_bytes: OnBytes) -> None:
        """Copy the files of `version`, a folder of the store, unless they are there; blocks.

        `on_bytes` is called with the number of bytes of each block. Raises CannotStore; then nothing stays, or the
        files of another upload of the same version.
        """
        try:
            if self._folder is not None:
                _into_folder(version, self._folder, digest, on_bytes)
            else:
                _into_objects(version, self.source(digest), on_bytes)
        except CannotStore:
            raise
        except Exception as error:  # each file system has errors of its own
            reason = getattr(error, "strerror", None) or first_line(error)
            raise CannotStore(f"it cannot be copied to {self._root} (--upload-to): {reason}") from error

    def sweep(self) -> None:
        """Remove the copies that killed servers have left."""
        if self._folder is None:
            return
        with suppress(OSError):
            for lock in self._folder.glob(f"{PARTIAL}*.lock"):
                with suppress(OSError), lock.open("w") as handle:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while a server writes it
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink()


def _into_folder(version: Path, root: Path, digest: str, on_bytes: OnBytes) -> None:
    target = root / digest.removeprefix("sha256:")
    root.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        with _partial(root) as partial:
            for name in _names(version):
                with (version / name).open("rb") as reading, (partial / name).open("xb") as writing:
                    _copy(reading, writing, on_bytes)
                    writing.flush()
                    os.fsync(writing.fileno())
                (partial / name).chmod(0o644)
            partial.chmod(0o755)
            with suppress(OSError):  # another upload of the same version was faster
                partial.rename(target)
    try:
        found = version_digest(target, on_bytes)
    except (AdapterError, OSError) as error:
        raise CannotStore(f"{target} is no copy of {digest[:19]}: remove it") from error
    if found != digest:
        raise CannotStore(f"{target} has other bytes than its name says: remove it")


@contextmanager
def _partial(root: Path) -> Iterator[Path]:
    """Yield a new folder in `root`, which is removed at the end unless it was renamed; locked meanwhile."""
    handle, name = tempfile.mkstemp(dir=root, prefix=PARTIAL, suffix=".lock")
    lock = Path(name)
    partial = lock.with_suffix("")
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(handle)


def _into_objects(version: Path, url: str, on_bytes: OnBytes) -> None:
    system, path = _filesystem(url)
    written: list[str] = []
    try:
        for name in _names(version):
            target, size = f"{path}/{name}", (version / name).stat().st_size
            if _size(system, target) == size:
                continue
            written.append(target)
            system.put_file(str(version / name), target, callback=_Reported(on_bytes))
            if (found := _size(system, target)) != size:
                raise CannotStore(f"{url}/{name} has {found} bytes after it was written, and not {size}: try again")
    except BaseException:
        for target in written:
            with suppress(Exception):  # the first error is the one to report
                system.rm_file(target)
        raise


class _Reported(Callback):
    """Reports the bytes that a file system has written."""

    def __init__(self, on_bytes: OnBytes) -> None:
        super().__init__()
        self._on_bytes = on_bytes

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._on_bytes(inc)


def _names(version: Path) -> list[str]:
    """Return the names of a version's files, the config last."""
    names = [name for name in files_of(version) if (version / name).exists()]
    return sorted(names, key=lambda name: name == CONFIG)


def _size(system: Any, target: str) -> int | None:
    """Return the size of an object, None where there is none; S3 denies access to one that is missing, too."""
    system.invalidate_cache()
    try:
        return int(system.info(target)["size"])
    except (FileNotFoundError, PermissionError):
        return None


def _copy(reading: Any, writing: Any, on_bytes: OnBytes) -> None:
    while block := reading.read(BLOCK):
        writing.write(block)
        on_bytes(len(block))


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. Raises ServeError."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # a scheme that is unknown, or whose package is not installed
        raise ServeError(f"--upload-to {url} cannot be used: {first_line(error)}") from error
    return system, path
