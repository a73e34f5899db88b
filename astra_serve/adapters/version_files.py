"""The files that a version of an adapter has, and the digest of their content, which is its name."""

import os
from collections.abc import Callable
from pathlib import Path

from astra_serve.errors import Damaged
from converter import adapter_dir
from converter.adapter_dir import CHAT_FILES, CONFIG, LORA_WEIGHTS, PROVENANCE

FILES = (LORA_WEIGHTS, CONFIG, PROVENANCE)  # beside them there may be those of CHAT_FILES


def version_digest(folder: Path, on_bytes: Callable[[int], None] = lambda _: None, *, with_chat: bool = True) -> str:
    """Return the digest over the files of a version: weights, config and, where they are there, record and chat files.

    Without the chat files it is the digest that the same folder had before they counted. `on_bytes` is called with the
    number of bytes of each block. Raises AdapterError and OSError.
    """
    names = files_of(folder, with_chat=with_chat)
    files = [adapter_dir.file_in(folder, name) for name in names if os.path.lexists(folder / name)]
    return adapter_dir.digest(files, on_bytes)


def files_of(folder: Path, *, with_chat: bool = True) -> tuple[str, ...]:
    """Return the names that the files of a version may have: FILES and CHAT_FILES.

    An index and shards may be in place of one file of weights. Raises AdapterError.
    """
    weights = adapter_dir.weight_files(folder) or [LORA_WEIGHTS]
    return (*weights, CONFIG, PROVENANCE, *(CHAT_FILES if with_chat else ()))


def named(folder: Path, expected: str | None, on_bytes: Callable[[int], None] = lambda _: None) -> tuple[str, bool]:
    """Return the digest of the version in `folder` that `expected` names, and whether it has the chat files.

    `expected` is that of all its files, of those without the chat files, or of the weights and config alone. Raises
    AdapterError, OSError, and Damaged where it is another one.
    """
    digest = version_digest(folder, on_bytes)
    if expected in (None, digest):
        return digest, True
    has_chat = any(os.path.lexists(folder / name) for name in CHAT_FILES)
    if has_chat and version_digest(folder, on_bytes, with_chat=False) == expected:
        return expected, False
    if expected == adapter_dir.lora_digest(folder):
        return digest, True
    raise Damaged(f"its digest is {digest}, not {expected}")
