"""Clients that ask a server without a pause, half of them streaming, and look at every answer.

Wrong answers are counted in kinds:

    failed   the request got an error, or was cut off
    mixed    the answer is not that of the version it names, or the stream names several
    stale    the version before answers a request that was sent after the swap had been confirmed
"""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class Answer:
    """What a request got, and when: seconds of `time.perf_counter`."""

    names: frozenset[str]  # that the answer gives itself
    text: str
    tokens: int
    sent: float
    first: float  # its first token came; for an answer that is not streamed, the answer
    ended: float


@dataclass
class Load:
    """What `clients` saw so far."""

    url: str
    clients: int
    pick: Callable[[int, int], tuple[str, str]]  # the model and the prompt of a client's number and turn
    judge: Callable[[str, str, Answer], str | None]  # what is wrong with an answer to these, if anything is
    max_tokens: int
    requests: int = 0
    faults: dict[str, int] = field(default_factory=lambda: {"failed": 0, "mixed": 0, "stale": 0})
    examples: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    _turns: dict[int, int] = field(default_factory=dict)

    async def run(self, stop: asyncio.Event) -> None:
        """Ask until `stop` is set; each client's last request ends."""
        await asyncio.gather(*(self._client(number, stop) for number in range(self.clients)))

    def fault(self, kind: str, example: str) -> None:
        self.faults[kind] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {example}"[:300])

    async def _client(self, number: int, stop: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            for turn in itertools.count(self._turns.get(number, 0)):
                if stop.is_set():
                    self._turns[number] = turn  # where it goes on, if it does
                    return
                model, prompt = self.pick(number, turn)
                self.requests += 1
                try:
                    answer = await ask(client, model, prompt, self.max_tokens, stream=number % 2 == 0)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.fault("failed", f"{type(error).__name__}: {error}")
                    await asyncio.sleep(0.05)
                    continue
                self.answers.append(answer)
                wrong = self.judge(model, prompt, answer)
                if wrong:
                    self.fault(wrong, f"{model}: {', '.join(answer.names)} said {answer.text!r}")


async def ask(
    client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int, *, stream: bool, salt: str | None = None
) -> Answer:
    """Return a greedy answer. Raises for a status, and for an end without a finish.

    `salt` keeps it out of the prefix cache of others.
    """
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body |= {"stream": stream, **({"cache_salt": salt} if salt else {})}
    sent = time.perf_counter()
    if not stream:
        reply = await client.post("/v1/completions", json=body)
        reply.raise_for_status()
        content = reply.json()
        now = time.perf_counter()
        tokens = content["usage"]["completion_tokens"]
        return Answer(frozenset([content["model"]]), content["choices"][0]["text"], tokens, sent, now, now)
    body["stream_options"] = {"include_usage": True}
    names, text, tokens, first, finished = set(), "", 0, 0.0, False
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        if not reply.is_success:
            await reply.aread()
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(chunk["error"])
            names.add(chunk["model"])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                first = first or time.perf_counter()
                text += choice["text"]
                finished = finished or choice["finish_reason"] is not None
    if not finished:
        raise ValueError("the stream ended without a finish")
    return Answer(frozenset(names), text, tokens, sent, first, time.perf_counter())


def quantiles(values: list[float]) -> dict[str, float]:
    """Return p50, p99 and the largest; nothing of fewer than two."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}
