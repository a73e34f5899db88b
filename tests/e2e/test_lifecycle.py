"""How the server process ends when it cannot start; that SIGTERM ends it well is checked by the session's server."""

import subprocess

import pytest

from benchmarks import demo
from benchmarks.server import BIN

pytestmark = pytest.mark.timeout(300)


def test_an_option_that_neither_we_nor_vllm_know_ends_with_status_2_and_says_so() -> None:
    command = [str(BIN / "astra-serve"), "--base", str(demo.BASE), "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr.splitlines()[-1]
