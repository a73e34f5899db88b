"""The text of a document, in a file or in any store that fsspec knows: read it, or replace it in one step."""

import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import httpx

from astra_serve.errors import BadDocument, Conflict, ServeError
from converter import atomic

MAX_BYTES = 2**26  # of a hundred thousand adapters with history
TRIES = 20  # to change a text that others change at the same time
PAUSE_S = 0.05
_CHANGED = (httpx.codes.PRECONDITION_FAILED, httpx.codes.CONFLICT)  # S3's answers where a condition does not hold
LOCK_S = 5.0  # for a lock, which is held while a file is written


def read(where: str) -> str:
    """Return the text, empty where there is none. Raises BadDocument where it is no text, and the store's errors."""
    try:
        data = _object(where) if "://" in where else _file(Path(where))
    except FileNotFoundError:
        return ""
    return decoded(data, where)


def decoded(data: bytes, where: str) -> str:
    """Return the text of a document's bytes. Raises BadDocument."""
    if len(data) > MAX_BYTES:
        raise too_large(where)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument(f"{where} is not UTF-8: byte {error.start} is none of a text") from error


def too_large(where: str) -> BadDocument:
    """Return the error of a document whose text is too large."""
    return BadDocument(f"{where} is larger than {MAX_BYTES >> 20} MiB, the limit for a document")


def edit(where: str, change: Callable[[str], str], mode: int = 0o644) -> tuple[str, str]:
    """Replace the text by the result of `change`, and return the text before and after.

    The text is replaced in one step, and only if it is still the one that `change` was given; otherwise `change` is
    called again. In a store without locks and conditional writes, as FTP, the text is compared right before the write.
    `mode` is that of a new file.

    Raises Conflict, ServeError, the store's errors and those of `change`; the text is unchanged then.
    """
    for _ in range(TRIES):
        before = read(where)
        after = change(before)
        if after == before:
            return before, after
        try:
            _replace(where, before, after, mode)
        except Conflict:
            time.sleep(PAUSE_S)
            continue
        return before, after
    raise Conflict("others change the document without a pause: try again")


def check_writable(where: str) -> None:
    """Raise ServeError where the document can only be read: a web page, a mounted ConfigMap."""
    if where.startswith(("http://", "https://", "file://")):
        raise ServeError(f"{where} can only be read from here: change it at its origin")
    if "://" not in where and Path(where).exists() and not os.access(Path(where).parent, os.W_OK):
        raise ServeError(f"{where} is read-only here, as a ConfigMap is: change it at its origin")


def digest(text: str) -> str:
    """Return the digest of a text: sha256:HEX."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _file(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise BadDocument(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}: give a file")
    with os.fdopen(handle, "rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _object(where: str) -> bytes:
    system, path = fsspec.core.url_to_fs(where)
    system.invalidate_cache()
    if (system.info(path).get("size") or 0) > MAX_BYTES:
        raise too_large(where)
    return bytes(system.cat_file(path))


def _replace(where: str, before: str, after: str, mode: int) -> None:
    """Write `after` over `before`. Raises Conflict where the text is another one."""
    if "://" not in where:
        path = Path(where).resolve()  # not the link, if it is one
        with _locked(path.parent):
            _check(where, before)
            _write(path, after, mode)
        return
    system, path = fsspec.core.url_to_fs(where)
    only_if: dict[str, Any] = {}
    if "s3" in system.protocol:
        try:
            only_if = {"IfMatch": system.info(path, refresh=True)["ETag"]}
        except FileNotFoundError:
            only_if = {"IfNoneMatch": "*"}
    _check(where, before)
    try:
        system.pipe_file(path, after.encode("utf-8"), **only_if)
    except OSError as error:
        answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if answer in _CHANGED or (answer == httpx.codes.NOT_FOUND and "IfMatch" in only_if):
            raise _changed() from error
        if error.errno != errno.ENOSYS or not only_if:
            raise
        system.pipe_file(path, after.encode("utf-8"))  # a service like S3 without conditional writes


def _check(where: str, before: str) -> None:
    if read(where) != before:
        raise _changed()


def _changed() -> Conflict:
    return Conflict("somebody else has changed the document meanwhile")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` while the block runs. Raises ServeError after LOCK_S."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + LOCK_S
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise ServeError(f"{folder} is locked by another process: is one of them stopped?") from error
                time.sleep(PAUSE_S)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str, mode: int) -> None:
    with atomic.new_file(path) as partial:
        partial.write_bytes(text.encode("utf-8"))  # with the line ends as they are
        _copy_access(path, partial, mode)


def _copy_access(old: Path, new: Path, mode: int) -> None:
    """Give a file the mode and the owner of the one that it replaces: servers of other users read it."""
    was = old.stat() if old.exists() else None
    with suppress(OSError):  # a file system that has none
        new.chmod(stat.S_IMODE(was.st_mode) if was else mode)
    if was:
        with suppress(OSError):  # without the right to change the owner, the group may be possible
            os.chown(new, -1, was.st_gid)
        with suppress(OSError):
            os.chown(new, was.st_uid, -1)
