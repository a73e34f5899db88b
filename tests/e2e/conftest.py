"""Two adapters really trained on the embedded base, and one server with the real engine for the whole session."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Document
from tests.support import demo
from tests.support.server import Server, astra_serve, free_port
from trainer.embedded import tasks

# A completion and a chat; the demo trains the third, too, and all of them on more rows and with all measurements.
TASKS = ("sql", "intent")
SETTINGS = (
    "steps=80",
    "batch_size=8",
    "learning_rate=4e-3",
    "calibration_rows=32",
    "forgetting_rows=0",
    "spectra=false",
)


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("e2e")
    tasks.write(out / "data")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("OMP_NUM_THREADS", "1")  # each on a core of its own: three quarters of the time
        found = pool.map(lambda task: demo.train_and_convert(task, out, SETTINGS), TASKS)
        return dict(zip(TASKS, found, strict=True))


@dataclass(frozen=True)
class Admin:
    """The admin port of the session's server, its token, the document that it edits, and its policy port."""

    port: int
    token: str
    document: Path
    policies: int
    policy_token: str


@pytest.fixture(scope="session")
def admin(loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Admin:
    document = tmp_path_factory.mktemp("desired") / "adapters.yaml"
    entries = [Adapter(name=task, source=str(folder), required=True) for task, folder in loras.items()]
    document.write_text(desired.dump(Document(adapters=entries)))
    return Admin(free_port(), "e2e-token", document, free_port(), "e2e-policies")


@pytest.fixture(scope="session")
def server(admin: Admin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    options = ["--base", str(demo.BASE), "--adapters", str(admin.document), "--store", str(folder / "store")]
    options += ["--admin-port", str(admin.port), "--policy-port", str(admin.policies)]
    options += ["--adapter-root", str(tmp_path_factory.getbasetemp())]
    options += ["--admin-port", str(admin.port), "--upload-to", str(admin.document.parent / "uploads")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTRA_ADMIN_TOKEN", admin.token)
        patch.setenv("ASTRA_POLICY_TOKEN", admin.policy_token)
        patch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        with astra_serve(options, folder / "server.log") as running:
            while (ready := httpx.get(f"{running.url}/readyz")).status_code == 503:
                assert running.process.poll() is None
                time.sleep(0.2)
            assert ready.json() == {"ready": True, "reasons": []}
            yield running
            end(running)


def end(server: Server) -> None:
    """SIGTERM while a stream runs: not ready, no new request, the stream ends complete, and the status is 0.

    So does a response in the background.
    """
    asked = {"model": "sql", "input": "Table a (b, c)", "max_output_tokens": 100, "background": True}
    left = httpx.post(f"{server.url}/v1/responses", json=asked)
    assert left.json()["status"] == "queued"
    body = {"model": "sql", "prompt": "Table a (b, c)", "max_tokens": 400, "ignore_eos": True, "stream": True}
    body |= {"n": 16}  # more than the sockets hold: the stream cannot end before it is read
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.terminate()
        while (ready := httpx.get(f"{server.url}/readyz")).status_code == 200:
            time.sleep(0.01)
        assert ready.json()["reasons"] == ["the server is shutting down"]
        late = httpx.post(f"{server.url}/v1/completions", json=body)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        *_, done = [line for line in lines if line]
        assert done == "data: [DONE]"
    assert server.process.wait(60) == 0, f"astra-serve ended with {server.process.returncode} after SIGTERM"
    records = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    (record,) = (one for one in records if one.get("request_id") == left.headers["x-request-id"])
    assert record["outcome"] == "ok"
    assert record["output_tokens"] > 0


@pytest.fixture
def api(server: Server, admin: Admin) -> Iterator[httpx.Client]:
    assert server.process.poll() is None
    headers = {"Authorization": f"Bearer {admin.token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{admin.port}", headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
