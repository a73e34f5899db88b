"""Three servers over one document, on three loopback addresses: what a Deployment's pods are on a cluster."""

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from astra_serve import desired
from astra_serve.desired import Adapter, Document
from astra_serve.store import FILES, version_digest
from benchmarks import demo
from benchmarks.load import Answer, Load
from benchmarks.server import BIN, Server, astra_serve, free_port
from converter.adapter_dir import LORA_WEIGHTS

pytestmark = pytest.mark.timeout(600)
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
CONVERGED_S = 10.0
OPTIONS = ["--base", str(demo.BASE), "--max-loras", "2", "--max-model-len", "512", "--enforce-eager"]


class Replicas:
    """The servers, the document that they follow, and `astra-serve adapters` with all their addresses."""

    def __init__(self, document: str, folder: Path) -> None:
        self.document, self.folder = document, folder
        self.admin_port = free_port()
        self.servers: list[Server] = []
        self._stacks = [ExitStack() for _ in HOSTS]

    def start(self) -> None:
        with ThreadPoolExecutor() as pool:
            self.servers = list(pool.map(self._start, range(len(HOSTS))))

    def kill(self, number: int) -> None:
        """As a node that loses its power: nobody is told, nothing is finished."""
        children = psutil.Process(self.servers[number].process.pid).children(recursive=True)
        self.servers[number].process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self.servers[number].process.wait()

    def restart(self, number: int) -> None:
        self._stacks[number].close()
        self.servers[number] = self._start(number)

    def close(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(ExitStack.close, self._stacks))

    def command(self, *words: object) -> list[str]:
        urls = [word for host in HOSTS for word in ("--url", f"http://{host}:{self.admin_port}")]
        return [str(BIN / "astra-serve"), "adapters", *urls, *map(str, words)]

    def adapters(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=False, timeout=120)

    def drift(self) -> list[str]:
        return list(json.loads(self.adapters("--json", "status").stdout)["drift"])

    def served(self, name: str) -> set[str | None]:
        """Return the digests that `name` means, of all replicas that answer."""
        found = json.loads(self.adapters("--json", "status").stdout)["replicas"]
        answers = [{a["name"]: a["version"] for a in one["adapters"]} for one in found if not one["fault"]]
        return {served[name]["digest"] if served.get(name) else None for served in answers}

    def converge(self) -> None:
        """All replicas serve what the document says, within ten seconds."""
        done = self.adapters("status", "--wait", CONVERGED_S)
        assert done.returncode == 0, done.stdout

    def write(self, change: Callable[[Document], Document]) -> None:
        """Change the document by hand, as a person or a pipeline does."""
        desired.write(change(desired.parse(desired.read(self.document), "")), self.document)

    def _start(self, number: int) -> Server:
        options = [*OPTIONS, "--adapters", self.document, "--store", str(self.folder / f"store{number}")]
        options += ["--admin-host", HOSTS[number], "--admin-port", str(self.admin_port)]
        server = astra_serve(options, self.folder / f"{number}.log", host=HOSTS[number])
        return self._stacks[number].enter_context(server)


@pytest.fixture(params=["a file", "an object in S3"])
def root(request, tmp_path: Path) -> str:
    """Where the document and the adapters are."""
    if request.param == "a file":
        return str(tmp_path)
    return str(request.getfixturevalue("bucket"))


@pytest.fixture
def replicas(root: str, loras, tmp_path: Path, monkeypatch) -> Iterator[Replicas]:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "e2e-token")
    for task, folder in loras.items():
        copy(folder, f"{root}/{task}")
    found = Replicas(f"{root}/adapters.yaml", tmp_path)
    entries = [Adapter(name="good", source=f"{root}/intent", required=True), Adapter(name="a", source=f"{root}/sql")]
    desired.write(Document(adapters=entries), found.document)
    try:
        found.start()
        yield found
    finally:
        found.close()


def copy(folder: Path, target: str) -> None:
    for name in FILES:
        put(f"{target}/{name}", (folder / name).read_bytes())


def put(target: str, content: bytes) -> None:
    with fsspec.open(target, "wb", auto_mkdir=True) as stream:
        stream.write(content)


class Traffic:
    """A client of each of some servers that asks two adapters in turn, until it is stopped."""

    def __init__(self, servers: list[Server]) -> None:
        self._texts: dict[tuple[str, str], str] = {}
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self.loads = [Load(server.url, 1, self._pick, self._judge, 12) for server in servers]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    def _run(self) -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*(load.run(self._stop) for load in self.loads))

        self._loop.run_until_complete(all_of_them())
        self._loop.close()

    @staticmethod
    def _pick(_: int, turn: int) -> tuple[str, str]:
        return ("good", "Table a (b, c)\nShow b.\nSQL:") if turn % 2 else ("a", "Table d (e, f)\nShow e.\nSQL:")

    def _judge(self, model: str, prompt: str, answer: Answer) -> str | None:
        """One version gives one answer to one prompt, at whichever replica, and says who it is."""
        (version,) = answer.names
        right = self._texts.setdefault((version, prompt), answer.text) == answer.text
        return None if right and version.startswith(f"{model}@") else "mixed"


def test_replicas_over_one_document_converge_whatever_happens_to_one_of_them(replicas, root: str, loras) -> None:
    sql, intent = (version_digest(loras[task]) for task in ("sql", "intent"))
    replicas.converge()
    assert replicas.served("a") == {sql}
    with Traffic(replicas.servers[:2]) as traffic:
        # A new version, everywhere or nowhere.
        done = replicas.adapters("rollout", "a", f"{root}/intent")
        assert done.returncode == 0, done.stderr
        assert replicas.served("a") == {intent}
        assert replicas.drift() == []

        # Back again; a replica dies when the first one has proved it.
        rolling = subprocess.Popen(replicas.command("rollout", "a", f"{root}/sql"), stderr=subprocess.PIPE, text=True)
        assert rolling.stderr is not None
        assert "prepare" in rolling.stderr.readline()
        replicas.kill(2)
        _, rest = rolling.communicate(timeout=120)
        assert rolling.returncode == 1
        assert f"{HOSTS[2]}:{replicas.admin_port} does not answer" in rest
        assert replicas.served("a") == {intent}
        assert any(HOSTS[2] in line and "does not answer" in line for line in replicas.drift())

        # While it is away the document is changed by hand; it comes back to what that says.
        replicas.write(lambda d: d.with_adapter(Adapter(name="a", source=f"{root}/sql", digest=sql)))
        replicas.restart(2)
        replicas.converge()
        assert replicas.served("a") == {sql}

        # An adapter whose bytes are not those that its entry names harms nobody, and is served once they are.
        weights = (loras["sql"] / LORA_WEIGHTS).read_bytes()
        copy(loras["sql"], f"{root}/damaged")
        put(f"{root}/damaged/{LORA_WEIGHTS}", weights[:-1] + bytes([weights[-1] ^ 1]))
        damaged = Adapter(name="damaged", source=f"{root}/damaged", digest=intent)
        done = replicas.adapters("rollout", "a", damaged.source, "--digest", sql)
        assert done.returncode == 1
        assert "the document is as before" in done.stderr
        replicas.write(lambda d: d.with_adapter(damaged))
        end = time.monotonic() + CONVERGED_S
        while len([line for line in replicas.drift() if "damaged is failed, serves none" in line]) < len(HOSTS):
            assert time.monotonic() < end
        copy(loras["intent"], damaged.source)
        replicas.converge()
        assert replicas.served("damaged") == {intent}
        assert replicas.served("a") == {sql}
    for load in traffic.loads:
        assert load.requests > 100
        assert (load.faults, load.examples) == ({"failed": 0, "mixed": 0, "stale": 0}, [])
    assert os.environ["ASTRA_ADMIN_TOKEN"] not in "".join(server.log.read_text() for server in replicas.servers)
