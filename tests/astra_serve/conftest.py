"""Adapters for the tiny base, a store, and a stand-in for the engine."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_serve.adapters.admission import Base, open_base
from astra_serve.adapters.store import Store
from converter import adapter_dir
from converter.adapter_dir import LoraAdapter
from tests.astra_serve.stand_in import MODULE, StandInEngine


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


@pytest.fixture
def engine() -> StandInEngine:
    return StandInEngine(capacity=2)
