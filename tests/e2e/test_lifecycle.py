"""How the server's processes end, well or badly. The session's own server ends with SIGTERM, in conftest."""

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks import demo
from benchmarks.server import BIN, astra_serve

pytestmark = pytest.mark.timeout(300)


def test_an_option_that_neither_we_nor_vllm_know_ends_with_status_2_and_says_so() -> None:
    command = [str(BIN / "astra-serve"), "--base", str(demo.BASE), "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr.splitlines()[-1]


def test_when_the_engine_is_killed_its_requests_get_errors_and_the_server_ends_with_status_1(tmp_path: Path) -> None:
    """A supervisor starts it again; a process that stays up and serves nothing would never be."""
    with astra_serve(["--base", str(demo.BASE), "--enforce-eager"], tmp_path / "log") as server:
        body = {"model": "base", "prompt": "def f(", "max_tokens": 400, "ignore_eos": True}

        def ask(stream: bool) -> tuple[int, str]:
            answer = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=60)
            return answer.status_code, answer.text

        with ThreadPoolExecutor(4) as pool:
            with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as running:
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
    last = server.log.read_text(errors="replace").splitlines()
    assert any(line.startswith("astra-serve: the engine has died") for line in last)
