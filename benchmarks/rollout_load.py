"""The trainer and the rollouts of `benchmarks.rollout`, as TRL's AsyncGRPOTrainer and its rollout worker call a server.

The load runs in phases: steady, publishing, steady, publishing, ..., steady. The tokens per second of each publishing
phase are compared with the steady phases just before and after it, because the speed of a shared machine varies.
"""

import asyncio
import itertools
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from benchmarks.policies import Policies
from tests.support.load import quantiles
from tests.support.server import Server
from tests.support.swap import memory_of
from trainer.embedded import tasks

SEED, PROMPTS, SAMPLES, TOKENS, STALENESS, NAME = 0, 8, 4, 64, 3, "policy"
BLOCKS, STEADY_S = 20, 5.0  # publishing phases, and the seconds of a steady phase
console = Console()


@dataclass(frozen=True)
class Pace:
    """The number of steps, the time between them, and the load before the first one."""

    steps: int
    every_s: float  # from the start of one step to the start of the next
    warm_up_s: float


@dataclass(frozen=True)
class Rollout:
    """One sampled answer; times are in seconds of `time.perf_counter`."""

    asked: int  # the policy that the request names
    model: str  # as the answer names it
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    sent: float
    ended: float


@dataclass
class Run:
    """A server under load: the policy that rollouts name now, and what was seen."""

    http: aiohttp.ClientSession
    url: str
    policies: Policies
    prompts: list[list[int]]
    current: int = 0
    rollouts: list[Rollout] = field(default_factory=list)
    failed: int = 0
    examples: list[str] = field(default_factory=list)
    publish_s: list[float] = field(default_factory=list)
    version_of: dict[int, str] = field(default_factory=dict)  # as the load call names it, if it does

    async def step(self) -> None:
        """Publish the next policy. Raises aiohttp.ClientError."""
        number = self.current + 1
        await self._post("/pause?mode=keep")
        folder = await asyncio.to_thread(self.policies.write, number)
        began = time.perf_counter()
        body = {"lora_name": f"{NAME}-v{number}", "lora_path": str(folder), "load_inplace": False}
        self.version_of[number] = await self._post("/v1/load_lora_adapter", body)
        self.publish_s.append(time.perf_counter() - began)
        await self._post("/resume")
        stale = number - STALENESS - 1
        if stale > 0:
            await self._post("/v1/unload_lora_adapter", {"lora_name": f"{NAME}-v{stale}"})
            self.policies.remove(stale - 1)
        self.current = number

    async def sample(self, number: int, stop: asyncio.Event) -> None:
        """Keep one sample in flight until `stop` is set."""
        prompt, seeds = self.prompts[number % len(self.prompts)], random.Random(f"{SEED} {number}")
        while not stop.is_set():
            asked, sent = self.current, time.perf_counter()
            body = {
                "model": f"{NAME}-v{asked}", "prompt": prompt, "max_tokens": TOKENS, "temperature": 1.0, "top_p": 1.0,
                "top_k": 0, "repetition_penalty": 1.0, "n": 1, "return_token_ids": True, "logprobs": 0,
                "seed": seeds.getrandbits(63),
            }  # fmt: skip
            try:
                async with self.http.post(f"{self.url}/v1/completions", json=body) as answer:
                    content = await answer.json()
                    answer.raise_for_status()
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self.failed += 1
                if len(self.examples) < 5:
                    self.examples.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(0.05)
                continue
            (choice,), ended = content["choices"], time.perf_counter()
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            self.rollouts.append(Rollout(asked, content["model"], prompt, tokens, logprobs, sent, ended))

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> str:
        """Return the version that an answer names, if it names one."""
        async with self.http.post(f"{self.url}{path}", json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise aiohttp.ClientError(f"{path} answered {answer.status}: {text[:200]}")
            content = await answer.json(content_type=None) if text.startswith("{") else {}
            return str(content.get("version", ""))


async def measure(
    server: Server, url: str, base: Path, policies: Policies, pace: Pace
) -> tuple[dict[str, Any], list[Rollout], dict[int, str]]:
    """Publish policies under load; return the measurements, the rollouts, and the version of each policy."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    prompts = [tokenizer.encode(row["prompt"]).ids for row in tasks.rows("sql", test=True, n=PROMPTS, seed=SEED)]
    settings = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=120)}
    async with aiohttp.ClientSession(**settings) as http:
        run, stop = Run(http, url, policies, prompts), asyncio.Event()
        await run.step()
        samples = [asyncio.create_task(run.sample(number, stop)) for number in range(PROMPTS * SAMPLES)]
        await asyncio.sleep(pace.warm_up_s)
        borders, memory, broken = await _publish(run, server, pace)
        stop.set()
        await asyncio.gather(*samples)
    rates = [_tokens(run.rollouts, a, b) / (b - a) for a, b in itertools.pairwise(borders)]
    ratios = [rates[i] / ((rates[i - 1] + rates[i + 1]) / 2 or 1) for i in range(1, len(rates) - 1, 2)]
    tenth = max(1, len(memory) // 10)
    found = {
        "steps": len(run.publish_s) - 1,
        "every_s": pace.every_s,
        "rollouts": len(run.rollouts),
        "failed": run.failed,
        "examples": run.examples,
        "broken": broken,
        "publish_s": quantiles(run.publish_s[1:]),
        "latency_s": quantiles([one.ended - one.sent for one in run.rollouts]),
        "tokens_per_s": rates,
        "tokens_ratios": ratios,
        "tokens_ratio": statistics.median(ratios) if ratios else 0.0,
        "rss_gib": [round(value / 2**30, 4) for value in memory[:: max(1, len(memory) // 200)]],
        "rss_growth": statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth])
        if len(memory) > 2 * tenth
        else None,
    }
    return found, run.rollouts, run.version_of


async def _publish(run: Run, server: Server, pace: Pace) -> tuple[list[float], list[int], str | None]:
    """Run the phases; return their borders, the server's memory at each step, and what ended the steps."""
    block = -(-pace.steps // BLOCKS)
    steady_s = min(STEADY_S, block * pace.every_s)
    process = psutil.Process(server.process.pid)
    processes = [process, *process.children(recursive=True)]
    borders, memory = [time.perf_counter()], []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("publishing", total=pace.steps)
        for number in range(pace.steps):
            if number % block == 0:
                await asyncio.sleep(steady_s)
                borders.append(time.perf_counter())
            began = time.perf_counter()
            try:
                await run.step()
            except (aiohttp.ClientError, TimeoutError) as error:
                return borders, memory, f"step {number}: {type(error).__name__}: {error}"[:300]
            memory.append(memory_of(processes))
            progress.advance(bar)
            await asyncio.sleep(max(0.0, began + pace.every_s - time.perf_counter()))
            if number % block == block - 1 or number == pace.steps - 1:
                borders.append(time.perf_counter())
    await asyncio.sleep(steady_s)
    return [*borders, time.perf_counter()], memory, None


def _tokens(rollouts: list[Rollout], begin: float, end: float) -> float:
    """Return the tokens that were sampled between two times, as if each rollout's came evenly."""
    return sum(
        len(one.tokens) * max(0.0, min(end, one.ended) - max(begin, one.sent)) / (one.ended - one.sent)
        for one in rollouts
    )
