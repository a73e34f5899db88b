"""Adapters for the tiny base, a store, and a stand-in for the engine that notices what no engine forgives."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_serve.adapters.admission import Base, open_base
from astra_serve.adapters.residency import HEADROOM
from astra_serve.adapters.store import Store
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Document
from astra_serve.errors import ServeError
from converter import adapter_dir
from converter.adapter_dir import LoraAdapter

MODULE = "model.layers.0.self_attn.q_proj"  # 32 x 32 in the tiny base


@pytest.fixture
def write_lora(tmp_path: Path, tiny_base: Path) -> Callable[..., Path]:
    """Write a LoRA of one layer that is filled with `value`; the same value gives the same version."""

    def write(name: str, value: float = 0.0, rank: int = 4, probe: Any = None) -> Path:
        layers = {MODULE: (torch.full((rank, 32), value), torch.full((32, rank), 0.1))}
        provenance = {"base": {"digest": adapter_dir.base_digest(tiny_base)}, **({"probe": probe} if probe else {})}
        with adapter_dir.new_folder(tmp_path / name) as partial:
            adapter_dir.save_lora(partial, LoraAdapter(layers, {"r": rank, "lora_alpha": rank}, provenance))
        return tmp_path / name

    return write


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "store")
    yield found
    found.close()


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> Base:
    return open_base(str(tiny_base))


def write_document(where: Path, document: Document) -> None:
    """Replace a document by hand, in one step: servers that look meanwhile must not find half of it."""
    document_text.edit(str(where), lambda _: desired.dump(document))


class StandInEngine:
    """Keeps adapters by name; says after every prompt what their first number makes of it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.loaded: dict[str, float] = {}
        self.loads: list[str] = []
        self.refuse: set[str] = set()
        self.silent: set[str] = set()  # adapters that change nothing
        self.asked: list[tuple[str | None, int, bool]] = []
        self.delay = 0.0

    async def load(self, name: str, folder: Path) -> str:
        await asyncio.sleep(self.delay)
        if any(name.startswith(refused) for refused in self.refuse):
            raise ServeError("the engine cannot load it: it said no")
        assert name not in self.loaded, f"{name} is loaded twice"
        assert len(self.loaded) < self.capacity + HEADROOM, "the engine would have pushed an adapter out"
        factors = adapter_dir.load_lora(folder).layers[MODULE]
        self.loaded[name] = 0.0 if any(name.startswith(s) for s in self.silent) else float(factors[0][0, 0])
        self.loads.append(name)
        return name

    async def unload(self, handle: str) -> None:
        await asyncio.sleep(self.delay)
        del self.loaded[handle]

    async def in_slots(self) -> set[str]:
        return set(self.loaded)

    async def next_tokens(
        self, prompts: list[list[int]], handle: str | None, *, urgent: bool = False
    ) -> list[dict[int, float]]:
        self.asked.append((handle, len(prompts), urgent))
        await asyncio.sleep(0)
        shift = 0.0 if handle is None else self.loaded[handle]
        return [{token: -1.0 - token / 10 - shift for token in range(20)} for _ in prompts]


@pytest.fixture
def engine() -> StandInEngine:
    return StandInEngine(capacity=2)
