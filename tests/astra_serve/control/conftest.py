"""A server over a document in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.astra_serve.world import server


@pytest.fixture
def world(engine, store, base, tmp_path: Path) -> Callable[..., Any]:
    """Return a running server over `adapters.yaml` when it is entered."""
    return lambda capacity=2, **more: server(engine, store, base, tmp_path / "adapters.yaml", capacity, **more)
