"""Three adapters really trained on the embedded base, and one server with the real engine for the whole session."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from benchmarks import demo
from benchmarks.server import Server, astra_serve
from trainer.embedded import tasks


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("e2e")
    tasks.write(out / "data")
    return {task: demo.train_and_convert(task, out) for task in tasks.TASKS}


@pytest.fixture(scope="session")
def server(loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--base", str(demo.BASE), *(f"--adapter={task}={folder}" for task, folder in loras.items())]
    with astra_serve(options, tmp_path_factory.mktemp("server") / "server.log") as running:
        yield running
    # The session's end is SIGTERM, after every request that the tests made: a clean server leaves with 0.
    assert running.process.returncode == 0, f"astra-serve ended with {running.process.returncode} after SIGTERM"


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
