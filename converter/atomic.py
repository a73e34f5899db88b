"""Write files and folders so that they appear complete or not at all. Imports only the standard library."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a new empty file beside `path`, which replaces `path` when the block succeeds.

    When the block raises, `path` is unchanged and the new file is removed. Only its owner can read the file, unless the
    block changes its mode. Raises OSError.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path`, which is renamed to `path` when the block succeeds.

    When the block raises, the new folder is removed. All users may read its files: safetensors creates files for their
    owner only, but servers run as other users. Subfolders are not supported. Raises OSError, also if `path` is a folder
    that is not empty.
    """
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        yield partial
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
            _sync(file)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
