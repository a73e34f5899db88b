"""Hot-swapping on the real engine, under load; benchmarks.swap does it longer, and against vLLM's own way."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks import demo, swap
from benchmarks.server import Server
from tests.e2e.conftest import Admin
from trainer.embedded import tasks

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def api(server: Server, admin: Admin) -> Iterator[httpx.Client]:
    assert server.process.poll() is None
    headers = {"Authorization": f"Bearer {admin.token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{admin.port}", headers=headers, timeout=60) as client:
        yield client


def test_swapping_under_load_fails_no_request_and_mixes_no_versions(server, admin, loras) -> None:
    adapters = [loras[task] for task in swap.TASKS]
    found = asyncio.run(swap.swapped(server, admin.port, admin.token, adapters, swaps=30))
    assert found["swaps"] == 30
    assert found["requests"] > 200
    assert (found["failed"], found["mixed"], found["examples"]) == (0, 0, [])
    assert found["broken"] is None
    assert found["left_in_engine"] == 1  # the one that serves; what it replaced has left


def test_what_the_engine_says_is_what_the_converter_recorded(api: httpx.Client, loras) -> None:
    for task in loras:
        probe = api.get(f"/adapters/{task}").json()["version"]["probe"]
        assert probe["recorded"] is True
        assert probe["deviation"] < 0.1
        assert probe["effect"] > 0.3


def test_weights_that_are_not_those_of_the_probe_never_serve(api: httpx.Client, loras, tmp_path: Path) -> None:
    """Another adapter's weights under a probe that was recorded of this one: only the engine can tell."""
    forged = tmp_path / "forged"
    shutil.copytree(loras["signature"], forged)
    shutil.copyfile(loras["sql"] / "astra.json", forged / "astra.json")
    answer = api.put("/adapters/forged", json={"source": str(forged)})
    assert answer.status_code == 422
    assert "nats from what the adapter should say" in answer.json()["error"]["message"]
    assert api.get("/adapters/forged").status_code == 404


def test_a_version_damaged_in_the_store_fails_alone_when_it_has_to_be_read_again(
    api: httpx.Client, client, server, loras
) -> None:
    assert api.put("/adapters/damaged", json={"source": str(loras["sql"])}).is_success
    assert api.put("/adapters/damaged", json={"source": str(loras["signature"])}).is_success
    # The version before has left the engine: its next request reads it from the store.
    before = api.get("/adapters/damaged").json()["previous"][0]
    store = Path(server.log).parent / "store" / "versions" / before["digest"].removeprefix("sha256:")
    weights = store / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        body = {"model": before["name"], "prompt": "x", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 503
        assert "was changed in the store" in answer.json()["error"]["message"]
    finally:
        weights.write_bytes(whole)
    for task in loras:
        row = tasks.rows(task, test=True, n=1)[0]
        assert demo.ask(client, task, row)
    assert server.process.poll() is None
    assert api.delete("/adapters/damaged").is_success
