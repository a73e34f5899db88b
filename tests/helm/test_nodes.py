"""One replica over two nodes, started as in the chart's LeaderWorkerSet, with both nodes on this machine.

The chart uses pipeline parallelism between nodes. vLLM's CPU build has none, so tensor parallelism replaces it here.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Document
from tests.support import demo
from tests.support.loras import write_random_lora
from tests.support.server import BIN, Server, astra_serve, free_port

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread_each")]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """An adapter with a recorded probe, which the engine must reproduce."""
    write_random_lora(tmp_path / "plain", seed=0)
    command = [BIN / "astra-convert", tmp_path / "plain", tmp_path / "recorded", "--base", demo.BASE]
    subprocess.run([*map(str, command)], check=True)
    return tmp_path / "recorded"


@pytest.fixture
def group(tmp_path: Path, recorded: Path) -> Iterator[tuple[Server, int, subprocess.Popen[bytes]]]:
    """The server of the leader, its admin port, and the process of the worker."""
    (tmp_path / "doc.yaml").write_text(
        desired.dump(Document(adapters=[Adapter(name="a", source=str(recorded), required=True)]))
    )
    admin = free_port()
    nodes = ["--base", str(demo.BASE), "--adapters", str(tmp_path / "doc.yaml"), "--max-loras", "2", "--enforce-eager"]
    nodes += ["--max-model-len", "512", "--tensor-parallel-size", "2"]
    nodes += ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    with (tmp_path / "worker.log").open("wb") as log:
        command = [str(BIN / "astra-serve"), *nodes, "--node-rank", "1", "--headless"]
        worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        leader = [*nodes, "--node-rank", "0", "--admin-port", str(admin), "--engine-timeout", "20"]
        with astra_serve(leader, tmp_path / "leader.log") as server:
            yield server, admin, worker
    finally:
        worker.kill()
        worker.wait()


def test_a_replica_over_two_nodes_serves_a_proved_adapter_and_ends_when_its_worker_ends(group) -> None:
    """The end of the leader lets the LeaderWorkerSet start the whole group again."""
    server, admin, worker = group
    while not httpx.get(f"{server.url}/readyz").is_success:
        assert server.process.poll() is None
        time.sleep(0.2)
    headers = {"Authorization": f"Bearer {os.environ['ASTRA_ADMIN_TOKEN']}"}
    probe = httpx.get(f"http://127.0.0.1:{admin}/adapters/a", headers=headers).json()["version"]["probe"]
    assert probe["recorded"] is True
    assert probe["deviation"] < 0.1
    texts = {model: ask(server, model).json()["choices"][0]["text"] for model in ("base", "a")}
    assert texts["base"] != texts["a"]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    with ThreadPoolExecutor() as pool:
        unanswered = pool.submit(ask, server, "a")
        # The engine of the leader hangs, or ends when it notices the end of the worker: not ready in both cases.
        with suppress(httpx.NetworkError, httpx.RemoteProtocolError):  # it may end while it answers
            while (ready := httpx.get(f"{server.url}/readyz", timeout=10)).is_success:
                time.sleep(0.2)
            assert "the engine has" in ready.text
        assert server.process.wait(60) == 1
        with suppress(httpx.HTTPError):  # an error or a closed connection, but no answer
            assert unanswered.result().status_code in (500, 503)
    messages = [json.loads(line)["message"] for line in server.log.read_text(errors="replace").splitlines()]
    assert any(message.startswith("astra-serve: the engine has") for message in messages)


def ask(server: Server, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "Table a (b, c)\nShow b.\nSQL:", "max_tokens": 12, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
