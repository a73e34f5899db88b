"""From a source as the desired state names it to a folder on this machine."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import snapshot_download

from astra_serve.adapters.store import FILES, Store
from astra_serve.errors import CannotFetch
from converter.adapter_dir import PROVENANCE
from converter.errors import first_line, without_secrets


def fetch(source: str, store: Store, roots: tuple[Path, ...] = ()) -> Path:
    """Return a folder with the adapter of `source`: a local one as it is, any other as a download in the store.

    A local folder must be inside one of `roots`, where there are any. Raises CannotFetch.
    """
    scheme, _, rest = source.partition("://")
    if not rest:
        return _local(Path(source), roots)
    if "::" in source:
        raise CannotFetch("a source is one URL, without '::'")
    if scheme in ("file", "local"):
        return _local(Path(rest), roots)
    folder = store.staging()
    try:
        if scheme == "hf":
            _from_hub(rest, folder)
        else:
            _from_url(source, folder)
    except Exception as error:  # each file system has errors of its own
        shutil.rmtree(folder, ignore_errors=True)
        raise CannotFetch(without_secrets(f"{source} cannot be fetched: {first_line(error)}")) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def mark(source: str) -> list[Any]:
    """Return what changes when an adapter's files at `source` do, as far as that can be told without reading them.

    Nothing for what cannot be reached, what `fetch` refuses, and the hub, where that would cost a request of its API.
    """
    scheme, _, rest = source.partition("://")
    found: list[Any] = []
    if scheme == "hf" or "::" in source:
        return found
    with suppress(Exception):  # each file system has errors of its own
        system, path = fsspec.core.url_to_fs(source if rest else str(Path(source).expanduser()))
        system.invalidate_cache()
        for name in FILES:
            with suppress(FileNotFoundError):
                found.append((name, system.checksum(f"{path.rstrip('/')}/{name}")))
    return found


def _local(path: Path, roots: tuple[Path, ...]) -> Path:
    try:
        real = path.expanduser().resolve()
    except (RuntimeError, ValueError, OSError) as error:  # a user or a name that cannot be
        raise CannotFetch(f"{str(path)!r} is no folder: {error}") from error
    if roots and not any(real.is_relative_to(root.resolve()) for root in roots):
        raise CannotFetch(f"{path} is outside of the folders that adapters may come from (--adapter-root)")
    if not real.is_dir():
        raise CannotFetch(f"there is no folder {path}")
    return real


def _from_hub(rest: str, folder: Path) -> None:
    repository, _, revision = rest.partition("@")
    found = snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES))
    for name in FILES:
        if (Path(found) / name).is_file():
            shutil.copyfile(Path(found) / name, folder / name)


def _from_url(source: str, folder: Path) -> None:
    system, path = fsspec.core.url_to_fs(source)
    for name in FILES:
        remote = f"{path.rstrip('/')}/{name}"
        if name == PROVENANCE and not system.exists(remote):
            continue
        system.get_file(remote, str(folder / name))
