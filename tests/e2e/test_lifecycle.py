"""How the server's processes end, well or badly. The session's own server ends with SIGTERM, in conftest."""

import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from astra_serve.gateway.middleware import OPEN
from tests.support import demo
from tests.support.server import BIN, Server, astra_serve

pytestmark = pytest.mark.timeout(300)
KEY = "the-api-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def test_an_option_that_neither_we_nor_vllm_know_ends_with_status_2_and_says_so() -> None:
    command = [str(BIN / "astra-serve"), "--base", str(demo.BASE), "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an API key, for this module; its last test ends it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        log = tmp_path_factory.mktemp("lifecycle") / "log"
        with astra_serve(["--base", str(demo.BASE), "--enforce-eager"], log) as running:
            yield running


def test_all_that_the_application_answers_is_behind_the_key_but_for_how_the_server_is(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=HEADERS) as known, httpx.Client(base_url=server.url) as unknown:
        paths = known.get("/openapi.json").json()["paths"]
        assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} < set(paths)
        assert not {"/invocations", "/scale_elastic_ep"} & set(paths)
        assert known.post("/invocations", json={"model": "nobody", "prompt": "x"}).status_code == 404
        for path, methods in {**paths, "/livez": ["get"], "/readyz": ["get"], "/docs": ["get"]}.items():
            for method in methods:
                closed = unknown.request(method, path, json={}).status_code == 401
                assert closed == (path not in OPEN), f"{method} {path}"
        assert known.get("/v1/models").is_success


def test_when_the_engine_is_killed_its_requests_get_errors_and_the_server_ends_with_status_1(server: Server) -> None:
    """A supervisor starts it again; a process that stays up and serves nothing would never be."""
    body = {"model": "base", "prompt": "def f(", "max_tokens": 400, "ignore_eos": True}
    url = f"{server.url}/v1/completions"

    def ask(stream: bool) -> tuple[int, str]:
        answer = httpx.post(url, json={**body, "stream": stream}, headers=HEADERS, timeout=60)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(4) as pool:
        with httpx.stream("POST", url, json={**body, "stream": True}, headers=HEADERS) as running:
            lines: Iterator[str] = running.iter_lines()
            next(lines)
            asked = [pool.submit(ask, stream) for stream in (True, False, True, False)]
            engine = [c for c in psutil.Process(server.process.pid).children() if "EngineCore" in c.name()]
            assert engine
            engine[0].send_signal(signal.SIGKILL)
            assert any('"error"' in line for line in lines)  # said, and not just cut off
        for status, text in (one.result() for one in asked):
            assert status in (500, 503) or '"error"' in text
    assert server.process.wait(60) == 1
    text = server.log.read_text(errors="replace")
    *_, last = (json.loads(line)["message"] for line in text.splitlines())  # every line is JSON
    assert last.startswith("astra-serve: the engine has died")
    assert KEY not in text
