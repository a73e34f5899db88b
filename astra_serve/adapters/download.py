"""Downloads one adapter, in a process of its own: `python -m astra_serve.adapters.download`, the order on stdin.

A source that accepts a connection and sends nothing cannot be interrupted in a thread; a process can be ended. The
order is JSON, {"source", "folder", "files": {name: most bytes}, "optional": [name], "denied": [name], "split",
"instead"}: a source may hold a password, and arguments are public. "split" is {"file", "index", "most", "shard",
"shards"}: where the source does not have that file, it may have an index of up to so many shards, whose names match
that expression. "instead" is the reason of the refusal by the name of a file that a source may have in its place; such
a file is not fetched. Each line on stdout is the number of bytes that are here.

An optional file is absent only if the source says so: any other error fails the download, because an adapter without
its record is served without its checks. A file in "denied" is absent also where access to it is denied: S3 says so of a
missing file, unless the bucket may be listed. The kernel refuses to write a file that is too large, whatever library
writes it.
"""

import errno
import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from fsspec.callbacks import Callback

from astra_serve.parent_death import end_with_parent
from converter.errors import first_line

TOO_LARGE = errno.EFBIG  # exit statuses; ENOSPC for a full disk, 1 for everything else
TELL_S = 0.5  # between two numbers of bytes
ABSENT = (404, 410)


class _Source(NamedTuple):
    """How the files of a source are read."""

    get: Callable[[str, Path, int], None]  # name, target, most bytes; raises FileNotFoundError where there is none
    has: Callable[[str], bool]  # name


class _TooLarge(Exception):
    pass


class _Refused(Exception):
    pass


class _Bounded(Callback):
    """Raises _TooLarge when a file is announced as too large, or becomes it while it is read, decompressed."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        self._check(size or 0)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._check(self.value)

    def absolute_update(self, value: int) -> None:
        super().absolute_update(value)
        self._check(value)

    def _check(self, size: int) -> None:
        if size > self._most:
            raise _TooLarge


def too_large(name: str, most: int) -> str:
    """Return the fault of a file that is too large."""
    return f"{name} has more than {most >> 20} MiB, the limit for an adapter of this base"


def main() -> int:
    """Fetch the files; return a status with one line on stderr when that fails."""
    end_with_parent()
    order = json.load(sys.stdin)
    folder = Path(order["folder"])
    watched = [folder]
    Thread(target=_tell, args=(watched,), daemon=True).start()
    name, most = "", 0
    try:
        source = (_hub if order["source"].startswith("hf://") else _url)(order, watched)
        for name, most in order["files"].items():
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            try:
                source.get(name, folder / name, most)
            except Exception as error:
                if not (isinstance(error, FileNotFoundError) or (name in order["denied"] and _is_denied(error))):
                    raise
                (folder / name).unlink(missing_ok=True)
                if name in order["optional"] or (name == order["split"]["file"] and _shards(source, order, most)):
                    continue
                raise
    except Exception as error:  # each file system has errors of its own
        status, reason = _failure(name, most, error)
        print(reason, file=sys.stderr)
        return status
    return 0


def _shards(source: _Source, order: dict[str, Any], most: int) -> bool:
    """Fetch the index of a split file and its shards, `most` bytes in all; return False if there is no index.

    Raises _Refused with the reason where the source has another file instead.
    """
    folder, split = Path(order["folder"]), order["split"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (split["most"], resource.RLIM_INFINITY))
    try:
        source.get(split["index"], folder / split["index"], split["most"])
    except FileNotFoundError as error:
        (folder / split["index"]).unlink(missing_ok=True)
        if reason := next((reason for name, reason in order["instead"].items() if source.has(name)), None):
            raise _Refused(reason) from error
        return False
    with (folder / split["index"]).open(encoding="utf-8-sig") as stream:
        found = json.load(stream)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not 0 < len(names) <= split["shards"] or not all(re.fullmatch(split["shard"], name) for name in names):
        raise ValueError(f"{split['index']} names no shards, or others than adapter_model-X-of-Y.safetensors")
    for name in sorted(names):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        source.get(name, folder / name, most)
        most = max(0, most - (folder / name).stat().st_size)
    return True


def _hub(order: dict[str, Any], watched: list[Path]) -> _Source:
    """Return how a file of a hub's repository is fetched: of the commit as it is now, into the hub's own cache."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download  # half a second
    from huggingface_hub.file_download import repo_folder_name

    repository, _, revision = order["source"].removeprefix("hf://").partition("@")
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    watched.append(cache / "blobs")
    if constants.HF_HUB_OFFLINE:
        patterns = [*order["files"], order["split"]["index"], "adapter_model-*.safetensors"]
        found = snapshot_download(repository, revision=revision or None, allow_patterns=patterns, local_files_only=True)
        return _Source(
            lambda name, target, _: _copy(Path(found) / name, target), lambda name: (Path(found) / name).exists()
        )
    # Not snapshot_download: where the hub fails it returns what its cache has, with or without the record.
    commit = HfApi().repo_info(repository, revision=revision or None).sha
    sizes = {one.path: getattr(one, "size", None) for one in HfApi().list_repo_tree(repository, revision=commit)}

    def get(name: str, target: Path, most: int) -> None:
        if name not in sizes:
            raise FileNotFoundError(name)
        _Bounded(most).set_size(sizes[name])
        try:
            here = Path(hf_hub_download(repository, name, revision=revision or None))
        except FileNotFoundError as error:  # also where the hub does not answer
            raise OSError(first_line(error)) from error
        if here.parent.name != commit:
            raise OSError("the repository was changed while it was read")
        _copy(here, target)

    return _Source(get, sizes.__contains__)


def _url(order: dict[str, Any], _: list[Path]) -> _Source:
    """Return how a file below a URL is fetched."""
    import fsspec

    source = order["source"]
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        import aiohttp

        # As it is stored, so that its length is known before; without the limit of 300 s for all of it.
        options["headers"] = {"Accept-Encoding": "identity"}
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None)}
    system, path = fsspec.core.url_to_fs(source, **options)

    def get(name: str, target: Path, most: int) -> None:
        try:
            system.get_file(f"{path.rstrip('/')}/{name}", str(target), callback=_Bounded(most))
        except Exception as error:
            if getattr(error, "status", None) in ABSENT:
                raise FileNotFoundError(name) from error
            raise

    def has(name: str) -> bool:
        with suppress(Exception):  # each file system has errors of its own
            return bool(system.exists(f"{path.rstrip('/')}/{name}"))
        return False

    return _Source(get, has)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _is_denied(error: Exception) -> bool:
    return isinstance(error, PermissionError) or getattr(error, "status", None) == 403


def _failure(name: str, most: int, error: Exception) -> tuple[int, str]:
    """Return the exit status and the reason, in one line."""
    if isinstance(error, _Refused):
        return 1, str(error)
    what = f"{name}: " if name else ""
    number = getattr(error, "errno", None)
    if isinstance(error, _TooLarge) or number == errno.EFBIG:
        return TOO_LARGE, too_large(name, most)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return errno.ENOSPC, f"{what}the disk is full"
    if isinstance(error, FileNotFoundError) and name:
        return 1, f"it has no {name}"
    if isinstance(error, PermissionError):
        return 1, f"{what}access is denied; S3 says so of a missing file, too, where the bucket may not be listed"
    if status := getattr(error, "status", None):  # of HTTP
        return 1, f"{what}the answer is {status} {getattr(error, 'message', '')}".rstrip()
    return 1, f"{what}{first_line(error)}"


def _tell(watched: list[Path]) -> None:
    """Print how many bytes are in some folders, again and again."""
    while True:
        total = 0
        for folder in list(watched):
            with suppress(OSError):
                total += sum(entry.stat().st_size for entry in os.scandir(folder))
        print(total, flush=True)
        time.sleep(TELL_S)


if __name__ == "__main__":
    sys.exit(main())
