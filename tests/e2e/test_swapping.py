"""Hot-swapping on the real engine, under load: benchmarks.swap measures the same, longer and against vLLM's own way."""

import asyncio
from pathlib import Path

import pytest

from benchmarks import swap

pytestmark = pytest.mark.timeout(400)


def test_swapping_under_load_fails_no_request_and_mixes_no_versions(loras: dict[str, Path], tmp_path: Path) -> None:
    found = asyncio.run(swap.ours(tmp_path, [loras[task] for task in swap.TASKS], swaps=60))
    assert found["swaps"] == 60
    assert found["requests"] > 200
    assert (found["failed"], found["mixed"], found["examples"]) == (0, 0, [])
    assert found["broken"] is None
    assert found["left_in_engine"] == 1  # the one that serves; what it replaced has left
