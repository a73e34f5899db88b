"""Swap one public name between two adapters while clients send requests, and measure what the clients see.

The load runs in phases: steady, swapping, steady, swapping, ..., steady. The throughput of each swapping phase is
compared with the steady phases just before and after it, because the speed of a shared machine varies over minutes.
"""

import asyncio
import bisect
import contextlib
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress

from tests.support import demo
from tests.support.load import Answer, Load, quantiles
from tests.support.server import Server
from trainer.embedded import tasks

SEED, CLIENTS, TOKENS, NAME = 0, 8, 16, "swapped"
TASKS = ("sql", "intent")  # of the two adapters
POOL = [row["prompt"] for row in tasks.rows("sql", test=True, n=64, seed=SEED)]
PROMPTS = POOL[:8]
LEAD = 0.3  # nats between the likeliest token and the next one: rounding, which depends on the batch, is far below
BLOCKS = 40  # swapping phases
STEADY_S = 5.0  # length of a steady phase; at most that of a swapping phase
PARTS = ("fetching", "verifying", "loading", "probing")  # states of a publication, as in the server's answer
console = Console()


@dataclass(frozen=True)
class Pace:
    """The number of swaps, the time between them, and the load before the first one."""

    swaps: int
    every_s: float  # from the start of one swap to the start of the next
    warm_up_s: float


def train_adapters(folder: Path) -> list[Path]:
    """Train and convert an adapter for each of TASKS, and return the folders of the LoRAs."""
    tasks.write(folder / "data")
    return [demo.train_and_convert(task, folder) for task in TASKS]


async def swapped(server: Server, admin: int, token: str, adapters: list[Path], pace: Pace) -> dict[str, Any]:
    """Publish the two `adapters` in turn on the admin port `admin`, and return the measurements (see `measure`)."""
    headers = {"Authorization": f"Bearer {token}"}
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin}", headers=headers, timeout=60) as api:

        async def publish(number: int) -> str:
            answer = await api.put(f"/adapters/{NAME}", json={"source": str(adapters[number % 2])})
            answer.raise_for_status()
            for part in PARTS:
                parts[part].append(answer.json()["seconds"].get(part, 0.0))
            version: str = answer.json()["version"]["name"]
            return version

        known = {}
        for number in (0, 1):
            version = await publish(number)
            known[version] = await known_answers(server, version)
        prompts = common(known.values())
        assert len({tuple(answers[prompt] for prompt in prompts) for answers in known.values()}) == 2, (
            "both adapters give the same answers: a wrong answer could not be detected"
        )

        def judge(_: str, prompt: str, answer: Answer) -> str | None:
            (name,) = answer.names if len(answer.names) == 1 else ("",)
            return None if known.get(name, {}).get(prompt) == answer.text else "mixed"

        found = await measure(server, judge, publish, pace, prompts)
        await asyncio.sleep(1)
        state = (await api.get(f"/adapters/{NAME}")).json()
    resident = [v["name"] for v in (state["version"], *state["previous"]) if v["residency"] in ("slot", "memory")]
    of_parts = {part: quantiles(seconds[2:]) for part, seconds in parts.items()}
    return {"server": "astra-serve", **found, "parts_s": of_parts, "left_in_engine": len(resident)}


async def known_answers(server: Server, model: str, salt: str | None = None) -> dict[str, str]:
    """Return the greedy answer of `model` to each prompt of POOL whose answer does not depend on rounding.

    The two adapters answer each other's questions with texts that they have not learned: there two tokens are often
    equally likely, and the batch of the moment decides. A `salt` keeps these requests apart from the prefix cache,
    whose blocks may be stale after `load_inplace`.
    """
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        found = await asyncio.gather(*(_greedy(client, model, prompt, salt) for prompt in POOL))
    return {prompt: text for prompt, (text, lead) in zip(POOL, found, strict=True) if lead >= LEAD}


def common(known: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the prompts that all of `known` have, as many as PROMPTS; fewer than half of that are an error."""
    of_all = set.intersection(*(set(answers) for answers in known))
    prompts = [prompt for prompt in POOL if prompt in of_all][: len(PROMPTS)]
    assert len(prompts) >= len(PROMPTS) / 2, f"only {len(prompts)} of {len(POOL)} prompts have a clear answer"
    return prompts


async def _greedy(client: httpx.AsyncClient, model: str, prompt: str, salt: str | None) -> tuple[str, float]:
    """Return a greedy answer, and the smallest lead of a token of it over the next likely one, in nats."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 2}
    answer = await client.post("/v1/completions", json={**body, **({"cache_salt": salt} if salt else {})})
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    leads = [0.0]
    for likely in choice["logprobs"]["top_logprobs"]:
        best, *others = sorted(likely.values(), reverse=True)
        leads.append(best - others[0] if others else 0.0)
    return choice["text"], min(leads[1:], default=0.0)


async def measure(
    server: Server,
    judge: Callable[[str, str, Answer], str | None],
    swap: Callable[[int], Awaitable[str]],
    pace: Pace,
    prompts: Sequence[str],
    model: Callable[[], str] = lambda: NAME,
) -> dict[str, Any]:
    """Call `swap` with 0, 1, 2, ... under load, and return counts, times in seconds, throughput ratios and memory.

    `swap` returns the name that new answers carry from then on; an HTTP error of `swap` ends the swaps. `model` returns
    the name in a request that is sent now.
    """
    load = Load(
        server.url, CLIENTS, lambda number, turn: (model(), prompts[(number + turn) % len(prompts)]), judge, TOKENS
    )
    stop = asyncio.Event()
    running = asyncio.create_task(load.run(stop))
    await asyncio.sleep(pace.warm_up_s)
    block, memory, broken = -(-pace.swaps // BLOCKS), [], None
    done: list[tuple[float, float, str]] = []  # of each swap: begin, end, name of the new answers
    steady_s = min(STEADY_S, block * pace.every_s)
    process = psutil.Process(server.process.pid)
    processes = [process, *process.children(recursive=True)]
    borders = [time.perf_counter()]  # of the phases
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("swapping", total=pace.swaps)
        for number in range(pace.swaps):
            if number % block == 0:
                await asyncio.sleep(steady_s)
                borders.append(time.perf_counter())
            began = time.perf_counter()
            try:
                name = await swap(number)
            except httpx.HTTPError as error:
                broken = f"swap {number}: {type(error).__name__}: {error}"[:200]
                break
            done.append((began, time.perf_counter(), name))
            memory.append(memory_of(processes))
            progress.advance(bar)
            await asyncio.sleep(max(0.0, began + pace.every_s - time.perf_counter()))
            if number % block == block - 1 or number == pace.swaps - 1:
                borders.append(time.perf_counter())
    await asyncio.sleep(steady_s)
    borders.append(time.perf_counter())
    stop.set()
    await running
    rates = [sum(a <= answer.ended < b for answer in load.answers) / (b - a) for a, b in itertools.pairwise(borders)]
    ratios = [rates[i] / ((rates[i - 1] + rates[i + 1]) / 2 or 1) for i in range(1, len(rates) - 1, 2)]
    tenth = max(1, len(memory) // 10)
    enough = len(memory) > 2 * tenth
    return {
        "swaps": len(done),
        "every_s": pace.every_s,
        "requests": load.requests,
        **load.faults,
        "examples": load.examples,
        "broken": broken,
        "requests_per_s": rates,
        "throughput_ratios": ratios,
        "throughput_ratio": statistics.median(ratios) if ratios else 0.0,
        "swap_s": quantiles([end - began for began, end, _ in done]),
        "first_token_s": quantiles(_first_tokens(done, load.answers)),
        "latency_s": quantiles([answer.ended - answer.sent for answer in load.answers]),
        "rss_gib": [round(value / 2**30, 4) for value in memory[:: max(1, len(memory) // 200)]],
        "rss_growth": statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth])
        if enough
        else None,
    }


def _first_tokens(done: list[tuple[float, float, str]], answers: list[Answer]) -> list[float]:
    """Return for each swap the seconds from its begin to the first token of the new name.

    Only requests that were sent after the begin of the swap and before the next one count.
    """
    by_sent = sorted(answers, key=lambda answer: answer.sent)
    sent = [answer.sent for answer in by_sent]
    found = []
    for number, (began, _, name) in enumerate(done):
        until = done[number + 1][0] if number + 1 < len(done) else float("inf")
        after = by_sent[bisect.bisect(sent, began) : bisect.bisect(sent, until)]
        found += sorted(answer.first - began for answer in after if answer.names == {name})[:1]
    return found


def memory_of(processes: list[psutil.Process]) -> int:
    """Return the resident bytes of the processes that still run."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total
