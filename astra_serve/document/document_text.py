"""The text of a document where it is, a file or an object of any store that fsspec knows: read, changed in one step."""

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import httpx

from astra_serve.errors import Conflict, ServeError

TRIES = 20  # to change it while others do, too
PAUSE_S = 0.05
_CHANGED = (httpx.codes.PRECONDITION_FAILED, httpx.codes.CONFLICT)  # how S3 says that a condition does not hold
LOCK_S = 5.0  # others hold a file's lock for as long as it takes to write it


def read(where: str) -> str:
    """Return the text; nothing where there is none. Raises what the store raises, UnicodeDecodeError included."""
    system, path = fsspec.core.url_to_fs(where)
    try:
        return str(system.cat_file(path).decode("utf-8"))
    except FileNotFoundError:
        return ""


def edit(where: str, change: Callable[[str], str]) -> tuple[str, str]:
    """Let the text be what `change` makes of it, and return it as it was and as it is.

    It is replaced in one step, and only if it is still what `change` was given; otherwise `change` is asked again. Of a
    store that has neither locks nor conditional writes, as FTP, that is looked at right before.
    Raises Conflict, ServeError, what the store raises, and what `change` raises; then the text is as it was.
    """
    for _ in range(TRIES):
        before = read(where)
        after = change(before)
        if after == before:
            return before, after
        try:
            _replace(where, before, after)
        except Conflict:
            time.sleep(PAUSE_S)
            continue
        return before, after
    raise Conflict("others change the document without a pause: try again")


def check_writable(where: str) -> None:
    """Raise ServeError where the document can only be read: a web page, a mounted ConfigMap."""
    if where.startswith(("http://", "https://", "file://")):
        raise ServeError(f"{where} can only be read from here: change it where it comes from")
    if "://" not in where and Path(where).exists() and not os.access(Path(where).parent, os.W_OK):
        raise ServeError(f"{where} is read-only here, as a ConfigMap is: change it where it comes from")


def digest(text: str) -> str:
    """Return what tells one text from another: sha256:HEX."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _replace(where: str, before: str, after: str) -> None:
    """Write `after` over `before`. Raises Conflict where the text is something else."""
    if "://" not in where:
        path = Path(where).resolve()  # not the link, if it is one
        with _locked(path.parent):
            _check(where, before)
            _write(path, after)
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
        system.pipe_file(path, after.encode("utf-8"))  # a service that is like S3, but for conditions


def _check(where: str, before: str) -> None:
    if read(where) != before:
        raise _changed()


def _changed() -> Conflict:
    return Conflict("somebody else has changed the document meanwhile")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others from changing files in `folder` while the block runs. Raises ServeError when that takes too long."""
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


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        _let_the_same_read(partial, path)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _let_the_same_read(new: Path, old: Path) -> None:
    """Give a file the mode and the owner of the one that it replaces: servers of other users read it."""
    was = old.stat() if old.exists() else None
    with suppress(OSError):  # a file system that has none
        new.chmod(stat.S_IMODE(was.st_mode) if was else 0o644)
    if was:
        with suppress(OSError):  # who may not give it to the owner may give it to the group
            os.chown(new, -1, was.st_gid)
        with suppress(OSError):
            os.chown(new, was.st_uid, -1)
