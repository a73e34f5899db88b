"""Chat templates of adapters, compiled and rendered by worker processes (`template_worker`).

A rendering has `seconds`, and memory as `template_worker` limits it. A worker that is too slow, or has ended, is
killed, and another one takes its place; the request that asked it fails alone. At most `workers` run, and one version
uses at most `share` of them at a time; a request waits for a worker for `wait_s`. Workers start at the first rendering,
wait for orders while none is given, and end with this process. Of its environment they have only the variables that
Python needs.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from astra_serve.adapters.pool import Slots
from astra_serve.adapters.template_worker import HEAD, MEMORY, MIB
from astra_serve.errors import ServeError, TemplateFailed, Unavailable
from converter.errors import first_line

COMMAND = (sys.executable, "-m", "astra_serve.adapters.template_worker")
START_S = 15.0  # for a worker to import what it needs
COMPILE_S = 20.0  # with its start; the worker itself has two seconds of a processor
KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV")
LONGEST = 2**22  # characters of a prompt
LARGEST_ANSWER = 64 * MIB  # bytes
ENDED = f"ended its process: it needs too much memory (over {MEMORY // MIB} MiB), or too long"


@dataclass(frozen=True)
class RenderLimits:
    """The limits of rendering, as above."""

    seconds: float = 1.0
    workers: int = 4
    share: int = 2
    wait_s: float = 10.0


@lru_cache(maxsize=32)
def content_format(text: str) -> str:
    """Return how a template takes contents, "openai" or "string", after compiling it in a process of its own.

    Raises TemplateFailed for one that cannot be compiled, and ServeError where no worker starts.
    """
    try:
        asked = subprocess.run(
            COMMAND, input=_message({"compile": text}), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=_environment(), timeout=COMPILE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TemplateFailed(f"takes more than {COMPILE_S:g} s to compile") from error
    except OSError as error:
        raise ServeError(f"no process for chat templates starts: {error.strerror}") from error
    messages = _messages(asked.stdout)
    if not messages:
        raise ServeError(
            "no process for chat templates starts: python -m astra_serve.adapters.template_worker says why"
        )
    if len(messages) < 2:
        raise TemplateFailed(ENDED)
    return str(_result(messages[1], "format"))


class Templates:
    """Renders chat templates; as a context it ends its workers with the block."""

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self._limits = limits or RenderLimits()
        self._slots = Slots(self._limits.workers, self._limits.share)
        self._idle: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> "Templates":
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            await _end(self._idle.pop())

    async def render(
        self,
        version: str,
        text: str,
        messages: list[Any],
        *,
        go_on: Any = False,
        variables: dict[str, Any],
        most: int = LONGEST,
    ) -> str:
        """Return the prompt that a version's template makes of messages; with `go_on`, open in the last message.

        It has up to `most` characters. Raises TemplateFailed with the reason, and Unavailable where no worker is free
        in time.
        """
        try:
            order = _message({
                "template": text, "messages": messages, "continue": go_on, "variables": variables,
                "most": min(most, LONGEST),
            })  # fmt: skip
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateFailed(f"cannot get the request: {first_line(error)}") from error
        async with self._slot(version):
            worker = await self._worker()
            reusable = False
            try:
                async with asyncio.timeout(self._limits.seconds):
                    answer = await _asked(worker, order)
                reusable = "fatal" not in answer
            except TimeoutError as error:
                raise TemplateFailed(f"takes more than {self._limits.seconds:g} s") from error
            except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
                raise TemplateFailed(ENDED) from error
            finally:
                if reusable:
                    self._idle.append(worker)
                else:
                    await _end(worker)
        return str(_result(answer, "text"))

    @asynccontextmanager
    async def _slot(self, version: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._limits.wait_s):
                await self._slots.acquire(version)
        except TimeoutError as error:
            raise Unavailable("all processes for chat templates are busy", retry_after_s=1) from error
        try:
            yield
        finally:
            self._slots.release(version)

    async def _worker(self) -> asyncio.subprocess.Process:
        while self._idle:
            worker = self._idle.pop()
            if worker.returncode is None:
                return worker
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        try:
            worker = await asyncio.create_subprocess_exec(
                *COMMAND, stdin=pipe, stdout=pipe, stderr=null, env=_environment()
            )
        except OSError as error:  # no memory, or too many processes
            raise Unavailable(f"no process for chat templates starts: {error.strerror}", retry_after_s=5) from error
        try:
            async with asyncio.timeout(START_S):
                await _read(worker)
        except (TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            await _end(worker)
            raise Unavailable("no process for chat templates starts", retry_after_s=5) from error
        except BaseException:
            await _end(worker)
            raise
        return worker


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in KEPT if name in os.environ}


def _message(content: dict[str, Any]) -> bytes:
    body = json.dumps(content, allow_nan=False).encode()
    return HEAD.pack(len(body)) + body


def _messages(stream: bytes) -> list[dict[str, Any]]:
    found = []
    while len(stream) >= HEAD.size:
        end = HEAD.size + HEAD.unpack(stream[: HEAD.size])[0]
        found.append(json.loads(stream[HEAD.size : end]))
        stream = stream[end:]
    return found


async def _asked(worker: asyncio.subprocess.Process, order: bytes) -> dict[str, Any]:
    assert worker.stdin is not None
    worker.stdin.write(order)
    await worker.stdin.drain()
    return await _read(worker)


async def _read(worker: asyncio.subprocess.Process) -> dict[str, Any]:
    assert worker.stdout is not None
    (length,) = HEAD.unpack(await worker.stdout.readexactly(HEAD.size))
    if length > LARGEST_ANSWER:
        raise ValueError("a worker sends more than it may")
    answer = json.loads(await worker.stdout.readexactly(length))
    if not isinstance(answer, dict):
        raise ValueError("a worker sends no object")
    return answer


async def _end(worker: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()


def _result(answer: dict[str, Any], name: str) -> Any:
    reason = answer.get("error") or answer.get("fatal")
    if name not in answer:
        raise TemplateFailed(" ".join(str(reason).split()) or "gives no reason")
    return answer[name]
