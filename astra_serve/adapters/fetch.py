"""From a source as the desired state names it to a folder on this machine."""

import asyncio
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from astra_serve.adapters.store import FILES, Store
from astra_serve.errors import CannotFetch
from converter.adapter_dir import PROVENANCE
from converter.errors import without_secrets


async def fetch(source: str, store: Store, roots: tuple[Path, ...] = ()) -> Path:
    """Return a folder with the adapter of `source`: a local one as it is, any other as a download in the store.

    A local folder must be inside one of `roots`, if there are any. A download ends when this is cancelled. Raises
    CannotFetch.
    """
    scheme, separator, rest = source.partition("://")
    if "::" in source:
        raise CannotFetch("a source is one URL, without '::'")
    if not separator or scheme in ("file", "local"):
        return await asyncio.to_thread(_local, Path(rest if separator else source), roots)
    folder = store.staging()
    try:
        await _download(source, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def fingerprint(source: str) -> list[Any]:
    """Return a value that changes when an adapter's files at `source` do, as far as file systems tell without reading.

    It is empty where the source cannot be reached, where `fetch` refuses it, and for the hub, where it would cost a
    request of the hub's API.
    """
    scheme, separator, _ = source.partition("://")
    found: list[Any] = []
    if scheme == "hf" or "::" in source:
        return found
    with suppress(Exception):  # each file system has errors of its own
        system, path = fsspec.core.url_to_fs(source if separator else str(Path(source).expanduser()))
        system.invalidate_cache()
        for name in FILES:
            with suppress(FileNotFoundError):
                found.append((name, system.checksum(f"{path.rstrip('/')}/{name}")))
    return found


def _local(path: Path, roots: tuple[Path, ...]) -> Path:
    try:
        real = path.expanduser().resolve()
        is_folder = real.is_dir()
    except (RuntimeError, ValueError, OSError) as error:  # a user or a name that cannot be
        raise CannotFetch(f"{str(path)!r} is no folder: {error}") from error
    if roots and not any(real.is_relative_to(root.resolve()) for root in roots):
        raise CannotFetch(f"{path} is outside of the folders that adapters may be in (--adapter-root)")
    if not is_folder:
        raise CannotFetch(f"there is no folder {path} on the server")
    return real


async def _download(source: str, folder: Path) -> None:
    order = {"source": source, "folder": str(folder), "files": FILES, "optional": [PROVENANCE]}
    pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    command = [sys.executable, "-m", "astra_serve.adapters.download"]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=nothing, stderr=pipe)
    try:
        _, errors = await process.communicate(json.dumps(order).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        *_, reason = errors.decode(errors="replace").strip().splitlines() or ["the download was killed"]
        raise CannotFetch(without_secrets(f"{source} cannot be fetched: {reason}"))
