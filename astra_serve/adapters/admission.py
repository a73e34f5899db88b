"""The rules that an adapter must satisfy before the engine reads it. Nothing here imports vllm."""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from astra_serve.adapters.defaults import BaseTokenizer, Defaults, read_defaults
from astra_serve.document.desired import NAME, NAME_IN_WORDS
from astra_serve.errors import ServeError
from converter import adapter_dir
from converter.adapter_dir import ENGINE_RANKS, BaseModules, LoraAdapter


class WeightsDigest:
    """The digest of the weights in a folder, computed at the first use: hundreds of gigabytes take minutes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._found, self._reading = folder, "", threading.Lock()

    def read(self) -> str:
        """Return sha256:HEX; concurrent callers wait for the first one. Raises AdapterError."""
        with self._reading:
            self._found = self._found or adapter_dir.base_digest(self._folder)
            return self._found


@dataclass(frozen=True)
class Admitted:
    """An adapter that the engine may read."""

    rank: int
    modules: list[str]  # by their names in the base
    unmatched: list[str]  # keys of rank_pattern and alpha_pattern that decide for no module
    dropped: list[str]  # tensors that equal those of the base; the engine does not get them
    rewritten: LoraAdapter | None  # the LoRA that the engine has to read in place of the folder; None: the folder
    defaults: Defaults  # of the requests that name it
    of_tokenizer: list[str]  # notes of its chat template and its tokenizer

    def notes(self) -> list[str]:
        """Return what an operator should know of how the adapter is read, a line each."""
        found = {
            "keys of rank_pattern or alpha_pattern match no module": self.unmatched,
            "left out, because they equal the base's tensors": self.dropped,
        }
        of_weights = [f"{what}: {', '.join(names[:8])}" for what, names in found.items() if names]
        return [*of_weights, *self.of_tokenizer]


@dataclass(frozen=True)
class Base:
    """The base model that every adapter must belong to."""

    name: str  # the `model` of requests for it
    folder: Path
    weights: WeightsDigest
    modules: BaseModules
    tokenizer: BaseTokenizer
    max_rank: int = ENGINE_RANKS[-1]

    @property
    def digest(self) -> str:
        """Return the digest of its weights. Raises AdapterError."""
        return self.weights.read()

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape (d_out, d_in) of every matrix, by each of its names."""
        return self.modules.shapes

    def check(self, folder: Path) -> Admitted:
        """Return how the engine reads the LoRA in `folder`, if it can serve it on this base; reads all weights.

        Raises ServeError and AdapterError.
        """
        header = adapter_dir.read_lora_header(folder)
        if header.base_digest is not None:  # otherwise the base's weights need not be read
            adapter_dir.check_base(folder, header.base_digest, self.digest)
        lora = adapter_dir.load_lora(folder)
        adapter_dir.check_init(folder, lora.config)
        if lora.config.get("fan_in_fan_out"):
            raise ServeError(
                f"{folder} adapts layers that store their weights transposed (GPT-2): vLLM has no LoRA there"
            )
        fitted = adapter_dir.on_base(folder, lora, self.folder, self.modules, for_engine=True)
        adapter_dir.check_only_factors(folder, fitted.lora)
        shapes = {fitted.names[module]: shape for module, shape in header.shapes.items()}
        adapter_dir.check_shapes(folder, shapes, self.shapes)
        if header.rank > self.max_rank:
            raise ServeError(f"{folder} has rank {header.rank}; the engine serves at most {self.max_rank}")
        if len(header.patterns) > 2 * len(self.shapes):
            raise ServeError(
                f"{folder} has {len(header.patterns)} keys in rank_pattern and alpha_pattern; the base has only "
                f"{len(self.shapes)} layers"
            )
        defaults, of_tokenizer = read_defaults(folder, self.tokenizer)
        adapter_dir.check_weights(folder, lora)
        has_bases_names = all(old == new for old, new in fitted.names.items())
        as_it_is = has_bases_names and not fitted.dropped and adapter_dir.is_plainly_written(folder)
        rewritten = None if as_it_is else fitted.lora
        modules = list(shapes)
        return Admitted(header.rank, modules, header.unmatched, fitted.dropped, rewritten, defaults, of_tokenizer)


def parse_adapter(text: str) -> tuple[str, Path]:
    """Return (name, folder) of `name=DIR`. Raises ServeError."""
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise ServeError(f"--adapter takes name=DIR, not {text!r}")
    if not re.fullmatch(NAME, name):
        raise ServeError(f"adapter name {name!r}: {NAME_IN_WORDS}")
    return name, Path(folder)


def base_name(base: str) -> str:
    """Return the `model` of requests for the base: a local folder's name, or the hub id as it is."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def open_base(base: str) -> Base:
    """Return the base that adapters are checked against; `base` is a folder or a hub id. Raises AdapterError."""
    folder = adapter_dir.find_base(base)
    modules = adapter_dir.base_modules(folder)
    return Base(base_name(base), folder, WeightsDigest(folder), modules, BaseTokenizer(folder))


def engine_rank(ranks: Iterable[int]) -> int:
    """Return the smallest maximum rank that the engine accepts and that holds every adapter."""
    largest = max(ranks, default=1)
    return next(rank for rank in ENGINE_RANKS if rank >= largest)
