"""Folders as a whole: new ones that appear complete or not at all, and the small files in them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from converter import atomic
from converter.adapter_dir.errors import CannotWrite, MalformedAdapter, NotAnAdapter, OutputExists, UnsafeAdapter

CONFIG = "adapter_config.json"
PROVENANCE = "astra.json"
LARGEST_JSON = 2**24  # bytes; the provenance of a thousand layers has 300 KiB

Json = dict[str, Any]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block succeeds; when it fails nothing is left behind.

    Raises OutputExists and CannotWrite.
    """
    refuse_existing(out)
    made = [parent for parent in out.parents if not parent.exists()]

    def remove_made(failed: type[BaseException] | None, *_: Any) -> None:
        if failed:
            with suppress(OSError):  # another run may have put its output beside ours
                for parent in made:
                    parent.rmdir()

    with ExitStack() as stack:
        stack.push(remove_made)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(atomic.new_folder(out))
        except OSError as error:
            raise CannotWrite(f"output folder {out} cannot be made: {error.strerror}") from error
        yield partial
        refuse_existing(out)


def refuse_existing(out: Path) -> None:
    """Raise OutputExists when there is something at `out`: nothing is ever overwritten."""
    if out.exists() or out.is_symlink():
        raise OutputExists(f"{out} exists already: choose another output folder or remove it first")


def file_in(folder: Path, name: str) -> Path:
    """Return the file `name` of an adapter folder, which must be inside it, or in the hub cache that it belongs to.

    Raises NotAnAdapter and UnsafeAdapter.
    """
    file = folder / name
    if not file.is_file():
        raise NotAnAdapter(f"{folder} has no {name}" if folder.is_dir() else f"there is no folder {folder}")
    real, home = file.resolve(), folder.resolve()
    # The hub's cache is models--org--name/snapshots/REVISION/FILE -> ../../blobs/HASH
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise UnsafeAdapter(f"{file} is a link that leads out of its folder, to {real}: copy the file itself")
    return file


def read_json(folder: Path, name: str) -> Json:
    """Return the JSON object in a file of an adapter folder.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    file = file_in(folder, name)
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise MalformedAdapter(f"{file} is larger than {LARGEST_JSON >> 20} MiB: no adapter's JSON is")
        content = json.loads(file.read_text(encoding="utf-8"))
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
    """Write `content` so that the same content gives the same bytes."""
    # PEFT's configs hold sets: they become sorted lists, so that the same adapter gives the same bytes.
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 over the names and bytes of `files`, as `sha256:...`."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                found.update(block)
    return f"sha256:{found.hexdigest()}"
