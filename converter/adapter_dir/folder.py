"""Output folders that appear complete or not at all, and the JSON files and digests of adapter folders."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from converter import atomic
from converter.adapter_dir.errors import CannotWrite, MalformedAdapter, NotAnAdapter, OutputExists, UnsafeAdapter

CONFIG = "adapter_config.json"
PROVENANCE = "astra.json"
MAX_JSON_BYTES = 2**24  # the provenance of a thousand layers has 300 KiB
MAX_CONFIG_BYTES = 2**22  # a config that names each of 20,000 experts has 1 MiB

Json = dict[str, Any]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a new empty folder, which is renamed to `out` when the block succeeds.

    When the block raises, the folder and the parents that were created for it are removed. Raises OutputExists and
    CannotWrite.
    """
    refuse_existing(out)
    missing_parents = [parent for parent in out.parents if not parent.exists()]

    def remove_parents(error: type[BaseException] | None, *_: Any) -> None:
        if error:
            with suppress(OSError):  # not empty: another run has written its output there
                for parent in missing_parents:
                    parent.rmdir()

    with ExitStack() as stack:
        stack.push(remove_parents)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(atomic.new_folder(out))
        except OSError as error:
            raise CannotWrite(f"output folder {out} cannot be made: {error.strerror}") from error
        yield partial
        refuse_existing(out)


def refuse_existing(out: Path) -> None:
    """Raise OutputExists if `out` exists, also as a broken link: no output is ever overwritten."""
    if out.exists() or out.is_symlink():
        raise OutputExists(f"{out} exists already: choose another output folder or remove it first")


def file_in(folder: Path, name: str) -> Path:
    """Return the path of file `name` in an adapter folder; a link must end in the folder or in its hub cache.

    Raises NotAnAdapter and UnsafeAdapter.
    """
    file = folder / name
    if not file.is_file():  # reading a pipe would wait for ever
        what = f"{name} that is a regular file" if os.path.lexists(file) else name
        raise NotAnAdapter(f"{folder} has no {what}" if folder.is_dir() else f"there is no folder {folder}")
    target, root = file.resolve(), folder.resolve()
    # The hub's cache is models--org--name/snapshots/REVISION/FILE -> ../../blobs/HASH
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise UnsafeAdapter(f"{file} is a link that leads out of its folder, to {target}: copy the file itself")
    return file


def read_json(folder: Path, name: str, most: int | None = None) -> Json:
    """Return the JSON object in file `name` of an adapter folder, which has `most` bytes at most.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    file, limit = file_in(folder, name), most or (MAX_CONFIG_BYTES if name == CONFIG else MAX_JSON_BYTES)
    try:
        if file.stat().st_size > limit:
            raise MalformedAdapter(f"{file} is larger than {limit >> 20} MiB, the limit for {name}")
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except MalformedAdapter:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedAdapter(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise MalformedAdapter(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise MalformedAdapter(f"{file} is not a JSON object")
    return content


def write_json(path: Path, content: Json) -> None:
    """Write `content` as indented JSON with sorted keys: the same content gives the same bytes."""
    # PEFT's configs contain sets, which become sorted lists.
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")


def digest(files: Iterable[Path], on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Return the SHA-256 of the names and bytes of `files`, as `sha256:...`.

    `on_bytes` is called with the number of bytes of each block.
    """
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                found.update(block)
                on_bytes(len(block))
    return f"sha256:{found.hexdigest()}"
