"""Three adapters really trained on the embedded base, and one server with the real engine for the whole session."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from astra_serve import desired
from astra_serve.desired import Adapter, Document
from benchmarks import demo
from benchmarks.server import Server, astra_serve, free_port
from trainer.embedded import tasks


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("e2e")
    tasks.write(out / "data")
    return {task: demo.train_and_convert(task, out) for task in tasks.TASKS}


@dataclass(frozen=True)
class Admin:
    """The admin port of the session's server, its token, and the document that it edits."""

    port: int
    token: str
    document: Path


@pytest.fixture(scope="session")
def admin(loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Admin:
    document = tmp_path_factory.mktemp("desired") / "adapters.yaml"
    entries = [Adapter(name=task, source=str(folder), required=True) for task, folder in loras.items()]
    desired.write(Document(adapters=entries), document)
    return Admin(free_port(), "e2e-token", document)


@pytest.fixture(scope="session")
def server(admin: Admin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    options = ["--base", str(demo.BASE), "--adapters", str(admin.document), "--store", str(folder / "store")]
    options += ["--admin-port", str(admin.port)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTRA_ADMIN_TOKEN", admin.token)
        with astra_serve(options, folder / "server.log") as running:
            while (ready := httpx.get(f"{running.url}/readyz")).status_code == 503:
                assert running.process.poll() is None
                time.sleep(0.2)
            assert ready.json() == {"ready": True, "reasons": []}
            yield running
    # The session's end is SIGTERM, after every request that the tests made: a clean server leaves with 0.
    assert running.process.returncode == 0, f"astra-serve ended with {running.process.returncode} after SIGTERM"


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
