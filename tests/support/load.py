"""Clients that send requests without a pause, half of them streaming, and check every answer.

Wrong answers are counted by kind:

    failed   the request got an error, or its stream ended early
    mixed    the answer differs from the known answer of the version that it names, or its stream names several versions
    stale    the previous version answers a request that was sent after the swap had been confirmed
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
    """The answer to one request; times are in seconds of `time.perf_counter`."""

    names: frozenset[str]  # the `model` of the answer, or of every chunk of the stream
    text: str
    tokens: int
    sent: float
    first: float  # when the first token arrived; without streaming, when the answer arrived
    ended: float


@dataclass
class Load:
    """A number of clients, and the answers and faults that they have seen."""

    url: str
    clients: int
    pick: Callable[[int, int], tuple[str, str]]  # (client number, turn) -> (model, prompt)
    judge: Callable[[str, str, Answer], str | None]  # (model, prompt, answer) -> kind of fault, or None
    max_tokens: int
    requests: int = 0
    faults: dict[str, int] = field(default_factory=lambda: {"failed": 0, "mixed": 0, "stale": 0})
    examples: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    _turns: dict[int, int] = field(default_factory=dict)

    async def run(self, stop: asyncio.Event) -> None:
        """Send requests until `stop` is set; the last request of each client is completed."""
        await asyncio.gather(*(self._client(number, stop) for number in range(self.clients)))

    def fault(self, kind: str, example: str) -> None:
        """Count a fault, and keep the first five as examples."""
        self.faults[kind] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {example}"[:300])

    async def _client(self, number: int, stop: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            for turn in itertools.count(self._turns.get(number, 0)):
                if stop.is_set():
                    self._turns[number] = turn  # the next `run` continues here
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
                kind = self.judge(model, prompt, answer)
                if kind:
                    self.fault(kind, f"{model}: {', '.join(answer.names)} answered {answer.text!r}")


async def ask(
    client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int, *, stream: bool, salt: str | None = None
) -> Answer:
    """Return a greedy answer; a request with a `salt` shares no prefix-cache block with requests of another salt.

    Raises httpx.HTTPError, and ValueError for an error in the stream or a stream without finish_reason.
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
        raise ValueError("the stream ended without a finish_reason")
    return Answer(frozenset(names), text, tokens, sent, first, time.perf_counter())


def quantiles(values: list[float]) -> dict[str, float]:
    """Return p50, p99 and max of `values`; an empty dict for fewer than two values."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}
