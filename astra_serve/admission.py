"""What an adapter must show before the engine may read it. Nothing here loads weights or imports the engine."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from astra_serve.errors import ServeError
from converter import adapter_dir
from converter.adapter_dir import ENGINE_RANKS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Admitted:
    """An adapter that fits the base: its public name, its folder and its rank."""

    name: str
    folder: Path
    rank: int


def parse_adapter(text: str) -> tuple[str, Path]:
    """Return (name, folder) of `name=DIR`. Raises ServeError."""
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise ServeError(f"--adapter takes name=DIR, not {text!r}")
    if not _NAME.fullmatch(name):
        raise ServeError(
            f"adapter name {name!r}: use up to 128 letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name, Path(folder)


def base_name(base: str) -> str:
    """Return the `model` by which requests name the base: a local folder's name, or the hub id as it is."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def admit(base: str, adapters: Iterable[tuple[str, Path]]) -> list[Admitted]:
    """Check every (name, folder) against `base`, a folder or hub id. Raises ServeError and AdapterError."""
    base_folder = adapter_dir.find_base(base)
    base_digest = adapter_dir.base_digest(base_folder)
    base_shapes = adapter_dir.base_shapes(base_folder)
    admitted: dict[str, Admitted] = {}
    for name, folder in adapters:
        if name in admitted:
            raise ServeError(f"two adapters are named {name!r}: names must differ")
        if name == base_name(base):
            raise ServeError(f"adapter {name!r} has the base's name: requests for the base would get the adapter")
        header = adapter_dir.read_lora_header(folder)
        adapter_dir.check_base(folder, header.base_digest, base_digest)
        adapter_dir.check_shapes(folder, header.shapes, base_shapes)
        if header.rank > ENGINE_RANKS[-1]:
            raise ServeError(f"adapter {name!r} has rank {header.rank}; the engine serves at most {ENGINE_RANKS[-1]}")
        admitted[name] = Admitted(name, folder.resolve(), header.rank)
    return list(admitted.values())


def engine_rank(adapters: Iterable[Admitted]) -> int:
    """Return the smallest maximum rank that the engine accepts and that holds every adapter."""
    largest = max((adapter.rank for adapter in adapters), default=1)
    return next(rank for rank in ENGINE_RANKS if rank >= largest)
