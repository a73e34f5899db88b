"""One bash for the commands of the pages: variables, background jobs and the working folder last from one to the next.

The working folder looks like the root of the repository and holds everything that the commands write, their home
folder included. A server of the pages gets free ports instead of 8000 to 8099, and does not compile its model, which
would take 20 s; the next command runs when the server is ready.
"""

import os
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from astra_serve.environment import ADMIN_URL
from tests.docs.pages import ROOT
from tests.support.server import BIN, free_port

READY_S = 240.0
PUBLIC_PORT, ADMIN_PORT = "8000", "8001"  # the defaults of the server and of its client


@dataclass(frozen=True)
class Result:
    """The exit status of a command, and what it wrote to stdout and stderr."""

    status: int
    output: str


class Shell:
    """A bash that runs one command after the other in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logs = folder / ".logs"
        self._logs.mkdir()
        for package in ("astra_serve", "benchmarks", "converter", "trainer"):
            (folder / package).symlink_to(ROOT / package)
        self._ports: dict[str, str] = {port: str(free_port()) for port in (PUBLIC_PORT, ADMIN_PORT)}
        self._count = 0
        self._servers: list[int] = []
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            env={**_environment(folder), ADMIN_URL: f"http://127.0.0.1:{self._ports[ADMIN_PORT]}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str) -> Result:
        """Run a command. One that starts a server in the background ends when the server is ready.

        Raises AssertionError, with the end of its log, where the server does not become ready.
        """
        serves = command.startswith("astra-serve --") and command.rstrip().endswith("&")
        if serves:
            port = "" if "--port " in command else f"--port {PUBLIC_PORT} "
            command = command.replace("astra-serve --", f"astra-serve --enforce-eager {port}--", 1)
        text = re.sub(r"\b80\d\d\b", self._free, command)
        self._count += 1
        script, log = (self._logs / f"{self._count:03}.{suffix}" for suffix in ("sh", "log"))
        script.write_text(text + "\n", encoding="utf-8")
        assert self._bash.stdin
        assert self._bash.stdout
        self._bash.stdin.write(f". {script} > {log} 2>&1 < /dev/null; echo $? $!\n")
        self._bash.stdin.flush()
        answer = self._bash.stdout.readline().split()
        assert answer, f"bash has ended: {log.read_text(errors='replace')}"
        if serves:
            self._servers.append(int(answer[1]))
            self._wait_until_ready(int(answer[1]), re.search(r"--port (\d+)", text), log)
        return Result(int(answer[0]), log.read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        """End the servers with SIGTERM, and bash. Raises AssertionError where a server's exit status is not 0."""
        try:
            statuses = [self.run(f"kill {pid}; wait {pid}").status for pid in self._servers]
            assert not any(statuses), f"exit statuses of servers after SIGTERM: {statuses}"
        finally:
            for process in [*psutil.Process(self._bash.pid).children(recursive=True), self._bash]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._bash.communicate()  # and closes the pipes

    def _free(self, port: re.Match[str]) -> str:
        return self._ports.setdefault(port[0], str(free_port()))

    def _wait_until_ready(self, pid: int, port: re.Match[str] | None, log: Path) -> None:
        assert port
        end = time.monotonic() + READY_S
        while time.monotonic() < end and _runs(pid):
            try:
                if httpx.get(f"http://127.0.0.1:{port[1]}/readyz", timeout=5).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise AssertionError(f"the server is not ready; the end of its log:\n{tail}")


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _environment(folder: Path) -> dict[str, str]:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # has the compiled kernel
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ASTRA_", "VLLM_"))}
    return {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "XDG_CACHE_HOME": cache,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "110",
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
    }
