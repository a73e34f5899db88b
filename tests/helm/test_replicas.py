"""Three servers over one document, on three loopback addresses, like the pods of a Deployment."""

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import fsspec
import httpx
import psutil
import pytest

from astra_serve.adapters.version_files import FILES, version_digest
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Document
from converter.adapter_dir import LORA_WEIGHTS
from tests.support import demo
from tests.support.loras import write_random_lora
from tests.support.server import BIN, Server, astra_serve, free_port

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread_each")]
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
CONVERGED_S = 10.0
OPTIONS = ["--base", str(demo.BASE), "--max-loras", "2", "--max-model-len", "512", "--enforce-eager"]


class Replicas:
    """Three servers, the document that they follow, and `astra-serve adapters` with the addresses of all servers."""

    def __init__(self, document: str, folder: Path) -> None:
        self.document, self.folder = document, folder
        self.admin_port = free_port()
        self.servers: list[Server] = []
        self._stacks = [ExitStack() for _ in HOSTS]

    def start(self) -> None:
        with ThreadPoolExecutor() as pool:
            self.servers = list(pool.map(self._start, range(len(HOSTS))))

    def kill(self, number: int) -> None:
        """Kill a server and its engine with SIGKILL, as when a node loses power."""
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

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.adapters("--json", "status").stdout))

    def served(self, name: str) -> set[str | None]:
        """Return the digests that the replicas serve as `name`, of all replicas that answer."""
        answers = [one["adapters"] for one in self.status()["replicas"] if not one["fault"]]
        found = [{adapter["name"]: adapter["version"] for adapter in adapters} for adapters in answers]
        return {served[name]["digest"] if served.get(name) else None for served in found}

    def converge(self) -> None:
        """Wait until all replicas serve the versions of the document, at most CONVERGED_S seconds."""
        done = self.adapters("status", "--wait", CONVERGED_S)
        assert done.returncode == 0, done.stdout

    def entry(self, name: str) -> Adapter | None:
        return desired.parse(document_text.read(self.document), self.document).get(name)

    def write(self, entry: Adapter) -> None:
        """Replace an entry of the document, or add it, as a person or a pipeline does."""

        def change(text: str) -> str:
            document = desired.parse(text, self.document)
            return desired.dump(document.replacing(entry.name, document.get(entry.name), entry))

        document_text.edit(self.document, change)

    def _start(self, number: int) -> Server:
        options = [*OPTIONS, "--adapters", self.document, "--store", str(self.folder / f"store{number}")]
        options += ["--admin-host", HOSTS[number], "--admin-port", str(self.admin_port)]
        server = astra_serve(options, self.folder / f"{number}.log", host=HOSTS[number])
        return self._stacks[number].enter_context(server)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_random_lora(folder / str(seed), seed=seed) for seed in range(4)]


@pytest.fixture(params=["a file", "an object in S3"])
def root(request, tmp_path: Path) -> str:
    """The folder or the bucket of the document and the adapters."""
    if request.param == "a file":
        return str(tmp_path)
    return str(request.getfixturevalue("bucket"))


@pytest.fixture
def replicas(root: str, loras: list[Path], tmp_path: Path, monkeypatch) -> Iterator[Replicas]:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine runs in the process of the server
    for lora in loras:
        copy(lora, f"{root}/{lora.name}")
    found = Replicas(f"{root}/adapters.yaml", tmp_path)
    entries = [Adapter(name="good", source=f"{root}/0", required=True), Adapter(name="a", source=f"{root}/1")]
    put(found.document, desired.dump(Document(adapters=entries)).encode())
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


def damage(target: str) -> None:
    """Flip one bit of the weights at `target`; a second call restores the weights."""
    with fsspec.open(f"{target}/{LORA_WEIGHTS}", "rb") as stream:
        content = stream.read()
    put(f"{target}/{LORA_WEIGHTS}", content[:-1] + bytes([content[-1] ^ 1]))


class Traffic:
    """One client for each server that requests two adapters in turn until the block ends, and checks the answers.

    A client pauses between requests, because three engines share the machine.
    """

    def __init__(self, servers: list[Server]) -> None:
        self.answers, self.faults = 0, list[str]()
        self._urls = [server.url for server in servers]
        self._texts: dict[str, str] = {}
        self._stop = threading.Event()

    def __enter__(self) -> "Traffic":
        self._threads = [threading.Thread(target=self.ask, args=(url,)) for url in self._urls]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def ask(self, url: str, times: int | None = None) -> None:
        """Send requests to a server, `times` of them or until the block ends."""
        with httpx.Client(base_url=url, timeout=60) as client:
            for model in itertools.islice(itertools.cycle(("good", "a")), times):
                if self._stop.wait(0.2):
                    return
                body = {"model": model, "prompt": "Table a (b, c)\nShow b.\nSQL:", "max_tokens": 12, "temperature": 0}
                try:
                    answer = client.post("/v1/completions", json=body).raise_for_status().json()
                except httpx.HTTPError as error:
                    self.faults.append(f"{url} {model}: {error}")
                    continue
                version, text = answer["model"], answer["choices"][0]["text"]
                self.answers += 1
                # One version gives the same answer at every replica, and the answer names the version.
                if self._texts.setdefault(version, text) != text or not version.startswith(f"{model}@"):
                    self.faults.append(f"{url} {model}: {version} answered {text!r}")


def test_replicas_over_one_document_converge_after_a_rollout_a_crash_and_a_damaged_source(
    replicas: Replicas, root: str, loras: list[Path]
) -> None:
    _, first, second, third = map(version_digest, loras)
    replicas.converge()
    assert replicas.served("a") == {first}
    with Traffic(replicas.servers[:2]) as traffic:
        # A rollout serves a new version at all replicas. Its entry has digest and source of the version before.
        done = replicas.adapters("rollout", "a", f"{root}/2")
        assert done.returncode == 0, done.stderr
        assert replicas.served("a") == {second}
        assert replicas.status()["drift"] == []
        (step,) = replicas.entry("a").steps
        assert (step.digest, step.source) == (first, f"{root}/1")

        # A replica is killed after all have proved the next version and the document names it: the entry is restored.
        command = replicas.command("rollout", "a", f"{root}/1")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as rolling:
            assert rolling.stderr is not None
            steps = iter(rolling.stderr.readline, "")
            next(line for line in steps if line.startswith("prepare") and HOSTS[2] in line)
            replicas.servers[2].process.send_signal(signal.SIGSTOP)  # present at the flip, silent after it
            next(line for line in steps if line.startswith("flip"))
            replicas.kill(2)
            rest = "".join(steps)
        assert rolling.returncode == 1
        assert rest.startswith(("serve", "restore"))
        assert "restore " in rest
        assert f"{HOSTS[2]}:{replicas.admin_port} does not answer" in rest
        assert replicas.served("a") == {second}
        assert any(HOSTS[2] in line and "does not answer" in line for line in replicas.status()["drift"])

        # The document is changed by hand while one replica is down. After its restart the replica follows the new text.
        replicas.write(Adapter(name="a", source=f"{root}/1", digest=first))
        replicas.restart(2)
        replicas.converge()
        assert replicas.served("a") == {first}
        traffic.ask(replicas.servers[2].url, 2)  # the restarted replica gives the same answers

        # A source that does not match the digest of its entry affects no other adapter, and is served once it matches.
        damage(f"{root}/3")
        done = replicas.adapters("rollout", "a", f"{root}/3", "--digest", third)
        assert done.returncode == 1
        assert "nothing was changed" in done.stderr
        replicas.write(Adapter(name="third", source=f"{root}/3", digest=third))
        end = time.monotonic() + CONVERGED_S
        while sum("third is failed, serves none" in line for line in replicas.status()["drift"]) < len(HOSTS):
            assert time.monotonic() < end
        damage(f"{root}/3")
        replicas.converge()
        assert replicas.served("third") == {third}
        assert replicas.served("a") == {first}
    assert traffic.faults == []
    assert traffic.answers > 100
    assert os.environ["ASTRA_ADMIN_TOKEN"] not in "".join(server.log.read_text() for server in replicas.servers)
