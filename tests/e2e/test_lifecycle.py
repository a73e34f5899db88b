"""How the server process starts and ends."""

import subprocess

import pytest

from benchmarks import demo
from benchmarks.server import BIN, astra_serve

pytestmark = pytest.mark.timeout(300)


def test_an_option_that_neither_we_nor_vllm_know_ends_with_status_2_and_says_so() -> None:
    command = [str(BIN / "astra-serve"), "--base", str(demo.BASE), "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr.splitlines()[-1]


def test_sigterm_ends_the_server_and_its_engine_with_status_0(tmp_path) -> None:
    with astra_serve(["--base", str(demo.BASE)], tmp_path / "log") as server:
        server.process.terminate()
        assert server.process.wait(60) == 0
