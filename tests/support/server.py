"""A running `astra-serve` process, or vLLM's own server, for the demo, the benchmarks and the end-to-end tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

BIN = Path(sys.executable).parent  # the console scripts of this environment


@dataclass(frozen=True)
class Server:
    """A server's base URL, its process and its log file."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    """Return a port on which no process listens, at any address of this machine."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


@contextmanager
def astra_serve(
    options: list[str],
    log: Path,
    *,
    host: str = "127.0.0.1",
    timeout_s: float = 240,
    program: Path = BIN / "astra-serve",
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Start `astra-serve` with `options` at `host`, wait until /health answers, yield it, and stop it with SIGTERM.

    Its store is beside the log, unless `options` set --store; `environment` has variables that are changed. Raises
    RuntimeError with the end of the log when the server exits or is not ready within `timeout_s` seconds.
    """
    if "--store" not in options:
        options = [*options, "--store", str(log.with_suffix(".store"))]
    with _running([str(program), *options, "--host", host], environment or {}, log, timeout_s, host) as server:
        yield server


@contextmanager
def vllm_serve(
    options: list[str], log: Path, environment: dict[str, str], *, timeout_s: float = 240
) -> Iterator[Server]:
    """Start vLLM's own server, which the benchmarks compare with, on all cores; otherwise as `astra_serve`."""
    environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **environment}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    with _running([*command, "--kv-cache-memory-bytes", str(2**30)], environment, log, timeout_s) as server:
        yield server


@contextmanager
def llama_cpp(model: Path, loras: list[Path], slots: int, length: int, log: Path) -> Iterator[Server]:
    """Start llama.cpp's server on all cores, with `slots` simultaneous requests; otherwise as `astra_serve`."""
    command = [sys.executable, "-m", "benchmarks.llamacpp_server", "--model", str(model), "--slots", str(slots)]
    command += ["--length", str(length), *(f"--lora={file}" for file in loras)]
    with _running(command, {}, log, 120) as server:
        yield server


@contextmanager
def _running(
    command: list[str], environment: dict[str, str], log: Path, timeout_s: float, host: str = "127.0.0.1"
) -> Iterator[Server]:
    port = free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env={**os.environ, **environment}, stdout=stream, stderr=subprocess.STDOUT
        )
    server = Server(f"http://{host}:{port}", process, log)
    try:
        _wait_until_ready(server, timeout_s)
        yield server
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _wait_until_ready(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-30:])
    state = "exited" if server.process.poll() is not None else f"was not ready after {timeout_s:.0f} s"
    raise RuntimeError(f"the server {state}; the end of {server.log}:\n{tail}")
