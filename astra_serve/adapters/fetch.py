"""From a source as the desired state names it to a folder on this machine.

A download runs in a process of its own, a local folder is read by a thread of its own pool: a source that hangs takes
at most its share of them, and nothing from stored adapters. There is no limit for the whole: a source is given up when
its bytes do not arrive any more (see `progress`).
"""

import asyncio
import errno
import json
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from astra_serve.adapters import download
from astra_serve.adapters.pool import Slots, Threads
from astra_serve.adapters.progress import FetchLimits, Progress, largest_files
from astra_serve.adapters.store import Store
from astra_serve.adapters.version_files import FILES, files_of
from astra_serve.errors import CannotFetch, CannotStore
from converter.adapter_dir import (
    ASTRA_WEIGHTS,
    CHAT_FILES,
    LORA_WEIGHTS,
    MAX_JSON_BYTES,
    MAX_SHARDS,
    PICKLED_WEIGHTS,
    PROVENANCE,
    SHARD,
    WEIGHTS_INDEX,
    MalformedAdapter,
    check_there,
)
from converter.errors import without_secrets

T = TypeVar("T")
INSTEAD = {  # of weights that a server reads: what a source may have, and what helps
    PICKLED_WEIGHTS: f"it has only {PICKLED_WEIGHTS}, a pickle, which can run code: download it, convert it with "
    "astra-convert DIR OUT_DIR --allow-pickle, and publish OUT_DIR",
    ASTRA_WEIGHTS: "it is an Astra adapter: download it, convert it with astra-convert DIR OUT_DIR, and publish "
    "OUT_DIR",
}


class Sources:
    """The pools in which one server reads its sources."""

    def __init__(self, limits: FetchLimits | None = None, folder: Path | None = None) -> None:
        """`folder` is the document's: relative paths begin there. None: they are refused."""
        self.limits, self._folder = limits or FetchLimits(), folder
        self.downloads = Slots(self.limits.downloads, self.limits.share)
        self.threads = Threads(self.limits.threads, self.limits.share)

    def located(self, source: str) -> str:
        """Return a source with its path absolute, if it is one. Raises CannotFetch."""
        if "://" in source or source.startswith(("sha256:", "~")) or Path(source).is_absolute():
            return source
        if self._folder is None:
            raise CannotFetch(f"{source} is a relative path, and the document is no file here: give an absolute one")
        return str(self._folder / source)

    async def read(self, source: str, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args, on_bytes)`, called in a thread; `on_bytes` takes the number of bytes of each block.

        Raises CannotFetch when no bytes arrive any more.
        """
        progress, total = Progress(self.limits, time.monotonic()), 0

        def on_bytes(number: int) -> None:
            nonlocal total
            total += number
            progress.note(total, time.monotonic())

        return await self.watched(source, self.threads.run(origin(source), function, *args, on_bytes), progress)

    async def fingerprint(self, source: str) -> list[Any]:
        """Return a value that changes when an adapter's files at `source` do, as far as file systems tell it.

        It is empty where the source does not answer in time, where `fetch` refuses it, and for the hub, where it would
        cost a request of the hub's API.
        """
        if source.startswith(("hf://", "sha256:")) or "::" in source:
            return []
        with suppress(Exception):  # each file system has errors of its own
            source = self.located(source)
            async with asyncio.timeout(self.limits.look_s):
                return await self.threads.run(origin(source), _fingerprint, source, self.limits.look_s)
        return []

    async def watched(self, source: str, reading: Awaitable[T], progress: Progress) -> T:
        """Return the result of `reading`. Raises CannotFetch, and cancels it, when no bytes arrive any more."""
        task = asyncio.ensure_future(reading)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=progress.due(time.monotonic()))
                if not task.done() and (fault := progress.fault(time.monotonic())):
                    raise CannotFetch(f"{without_secrets(source)} cannot be fetched: {fault}")
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait([task])


async def fetch(source: str, store: Store, roots: tuple[Path, ...] = (), sources: Sources | None = None) -> Path:
    """Return a folder with the adapter of `source`: a local one as it is, any other as a download in the store.

    A local folder must be inside one of `roots`, if there are any. A download ends when this is cancelled. Raises
    CannotFetch, CannotStore, and MalformedAdapter where a file is too large.
    """
    sources = sources or Sources()
    if "::" in source:
        raise CannotFetch("a source is one URL, without '::'")
    source = sources.located(source)
    if path := local_path(source):
        return await sources.read(source, _local, path, roots, sources.limits.max_bytes)
    try:
        return await _downloaded(source, store, sources)
    except CannotStore:
        if not await asyncio.to_thread(store.drop_spare):
            raise
        return await _downloaded(source, store, sources)


def local_path(source: str) -> Path | None:
    """Return the folder of a source on this machine, None for any other source."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return Path(source)
    return Path(rest) if scheme in ("file", "local") else None


def origin(source: str) -> str:
    """Return where a source is, without its path: scheme and host, or the mount point of a local folder."""
    if source.startswith("hf://"):
        return "hf://"
    path = local_path(source)
    if path is None:
        with suppress(ValueError):
            parts = urlsplit(source)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        return source[:100]
    path = path.absolute()
    return next((str(one) for one in (path, *path.parents) if str(one) in _mounts()), "/")


def _mounts() -> set[str]:
    """Return the mount points of this machine (Linux): a hung one is found without touching it."""
    with suppress(OSError):
        return {line.split()[1] for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines()}
    return set()


def _fingerprint(source: str, timeout_s: float) -> list[Any]:
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        import aiohttp  # which fsspec needs for HTTP alone

        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=timeout_s)}}
    system, path = fsspec.core.url_to_fs(source if "://" in source else str(Path(source).expanduser()), **options)
    system.invalidate_cache()
    found: list[Any] = []
    folder, names = path.rstrip("/"), [*FILES, *CHAT_FILES, WEIGHTS_INDEX]
    for name in names:
        with suppress(FileNotFoundError):
            found.append((name, system.checksum(f"{folder}/{name}")))
            if name == WEIGHTS_INDEX:
                names += sorted(Path(shard).name for shard in system.glob(f"{folder}/adapter_model-*.safetensors"))
    return found


def _local(path: Path, roots: tuple[Path, ...], max_bytes: int, _: Callable[[int], None]) -> Path:
    try:
        real = path.expanduser().resolve()
        is_folder = real.is_dir()
    except (RuntimeError, ValueError, OSError) as error:  # a user or a name that cannot be
        raise CannotFetch(f"{str(path)!r} is no folder: {error}") from error
    _check_inside(path, real, roots)
    if not is_folder:
        raise CannotFetch(f"there is no folder {path} on the server")
    check_there(real)
    there = [name for name in files_of(real) if (real / name).exists()]
    for name in there:  # a link from a hub's cache may lead out of the roots
        _check_inside(path / name, (real / name).resolve(), roots)
    sizes = {name: (real / name).stat().st_size for name in there}
    shards = [size for name, size in sizes.items() if name not in (*FILES, *CHAT_FILES, WEIGHTS_INDEX)]
    sizes[LORA_WEIGHTS] = sizes.get(LORA_WEIGHTS, 0) + sum(shards)
    for name, most in largest_files(max_bytes).items():
        if sizes.get(name, 0) > most:
            raise MalformedAdapter(f"{path}: {download.too_large(name, most)}")
    return real


def _check_inside(path: Path, real: Path, roots: tuple[Path, ...]) -> None:
    if roots and not any(real.is_relative_to(root.resolve()) for root in roots):
        raise CannotFetch(f"{path} is outside of the folders that adapters may be in (--adapter-root)")


async def _downloaded(source: str, store: Store, sources: Sources) -> Path:
    async with sources.downloads.of(origin(source)):
        folder = await asyncio.to_thread(store.staging)
        try:
            await _download(source, folder, sources)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder


async def _download(source: str, folder: Path, sources: Sources) -> None:
    order = {
        "source": source,
        "folder": str(folder),
        "files": largest_files(sources.limits.max_bytes),
        "optional": [PROVENANCE, *CHAT_FILES],
        "denied": list(CHAT_FILES),
        "split": {
            "file": LORA_WEIGHTS,
            "index": WEIGHTS_INDEX,
            "most": MAX_JSON_BYTES,
            "shard": SHARD,
            "shards": MAX_SHARDS,
        },
        "instead": INSTEAD,
    }
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "astra_serve.adapters.download"]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    progress = Progress(sources.limits, time.monotonic())

    async def follow(output: asyncio.StreamReader) -> None:
        async for line in output:
            progress.note(int(line), time.monotonic())

    async def ended() -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
        _, errors = await asyncio.gather(follow(process.stdout), process.stderr.read())
        await process.wait()
        return errors

    try:
        errors = await sources.watched(source, ended(), progress)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        *_, reason = errors.decode(errors="replace").strip().splitlines() or ["the download was killed"]
        raise _failure(process.returncode, f"{without_secrets(source)} cannot be fetched: {without_secrets(reason)}")


def _failure(status: int, message: str) -> Exception:
    if status == download.TOO_LARGE:
        return MalformedAdapter(message)
    return CannotStore(message) if status == errno.ENOSPC else CannotFetch(message)
