"""Does a tenant that floods a full engine keep a calm one waiting, and what do fair shares cost?

    python -m benchmarks.fairness --out FILE.json [--quick] [--base DIR]

The engine computes 16 sequences at a time. One tenant keeps 64 requests there, each of 16 to 64 tokens, half of them
streaming; a calm one asks once a second for 16 tokens. All requests are for the base. Three servers run side by side
and take turns, only one of them has load at a time: `astra-serve --keys`, the same without tenants (requests go to the
engine as they arrive), and vLLM's own server.

    ttft         seconds from a request of the calm tenant to its first token, the median: alone, and beside the flood
    ratio        beside the flood / alone; `stock_ratio` is that of vLLM
    throughput   tokens per second of both tenants beside the flood, with --keys / without: the median over the turns
    share_error  three tenants with weights 1, 2 and 4 and 24 requests each: the largest relative error of a tenant's
                 tokens against its weight

Tokens are those of prompts and answers of the requests that ended in a turn, without its first seconds.
"""

import argparse
import asyncio
import itertools
import json
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from astra_serve.document.keys import Key, Keys, Tenant, hash_of
from astra_serve.document.strict import dumped
from benchmarks import report
from tests.support import demo
from tests.support.load import quantiles
from tests.support.server import Server, astra_serve, vllm_serve
from trainer.embedded import tasks

SEED, PLACES, FLOOD, TOKENS, CALM_TOKENS = 0, 16, 64, (16, 64), 16
WEIGHTS = {"light": 1.0, "middle": 2.0, "heavy": 4.0}
SHARE_TOKENS = (8, 24)  # of an answer of a tenant with a weight: many requests end in a short time
BACKLOG = 24  # requests at a time of each tenant with a weight
WARM_UP_S = 4.0  # of a turn, until the places are filled and answers of all lengths have ended
TARGETS = {"ratio": 10, "throughput_ratio": 0.95, "share_error": 0.1}
PROMPTS = [row["prompt"] for row in tasks.rows("sql", test=True, n=32, seed=SEED)]
console = Console()


@dataclass
class Rival:
    """A server under test, and its measurements by turn."""

    name: str
    server: Server
    alone_s: list[float] = field(default_factory=list)  # to the first token
    beside_s: list[float] = field(default_factory=list)
    tok_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """A request that has ended; times are in seconds of `time.perf_counter`."""

    tenant: str
    tokens: int  # of the prompt and the answer
    sent: float
    first: float  # its first token; of a whole answer, its end
    ended: float


@dataclass(frozen=True)
class Seen:
    """The requests of a time of load, without its warm-up."""

    requests: list[Ended]
    since: float
    until: float

    def calm_s(self) -> list[float]:
        """Return the seconds to the first token of the requests that the calm tenant has sent in this time."""
        calm = [one for one in self.requests if one.tenant == "calm" and self.since <= one.sent <= self.until]
        return [one.first - one.sent for one in calm]

    def tokens(self) -> Counter[str]:
        """Return the tokens by tenant of the requests that ended in this time."""
        found = Counter[str]()
        for one in self.requests:
            if self.since <= one.ended <= self.until:
                found[one.tenant] += one.tokens
        return found


@dataclass(frozen=True)
class Pace:
    """How often, and for how many seconds, each server is measured."""

    turns: int
    alone_s: float
    beside_s: float
    shares_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="smoke run: two short turns of each server")
    parser.add_argument("--base", type=Path, default=demo.BASE, help="(default: the embedded base)")
    args = parser.parse_args()
    pace = Pace(2, 4.0, 12.0, 30.0) if args.quick else Pace(6, 6.0, 20.0, 60.0)
    env = report.environment(SEED)
    keys = {name: secrets.token_urlsafe(32) for name in ("flood", "calm", *WEIGHTS)}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        rivals = start(stack, str(args.base), Path(temporary), keys)
        shares = asyncio.run(measure(rivals, keys, pace))
    cases = [case(rival) for rival in rivals]
    summary = summarise(cases, shares)
    report.write(args.out, summary, [*cases, {"server": rivals[0].name, "weights": WEIGHTS, "shares": shares}], env)
    show(cases, summary)
    return 0


def start(stack: ExitStack, base: str, folder: Path, keys: dict[str, str]) -> list[Rival]:
    """Start the three servers one after the other."""
    tenants = [
        Tenant(name=name, keys=[Key(hash=hash_of(key))], base=True, weight=WEIGHTS.get(name, 1.0))
        for name, key in keys.items()
    ]
    document = folder / "keys.yaml"
    document.write_text(dumped(Keys(tenants=tenants).model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    common = ["--max-num-seqs", str(PLACES), "--enforce-eager"]
    ours = ["--base", base, *common]
    found = []
    for name, options in (("fair shares", [*ours, "--keys", str(document)]), ("without tenants", ours)):
        with console.status(f"starting astra-serve, {name}"):
            log = folder / f"{len(found)}.log"
            found.append(Rival(f"astra-serve, {name}", stack.enter_context(astra_serve(options, log))))
    with console.status("starting vllm"):
        options = ["--model", base, "--served-model-name", Path(base).resolve().name, *common]
        found.append(Rival("vllm", stack.enter_context(vllm_serve(options, folder / "vllm.log", {}))))
    return found


async def measure(rivals: list[Rival], keys: dict[str, str], pace: Pace) -> dict[str, int]:
    """Load the servers in turn, and return the tokens of the tenants with weights."""
    for turn in track(range(pace.turns), "measuring", console=console, transient=True):
        for rival in rivals if turn % 2 == 0 else rivals[::-1]:
            async with Clients(rival.server.url, keys) as clients:
                if turn == 0:
                    await clients.load({}, calm=True, seconds=3.0)  # the first requests are slower
                alone = await clients.load({}, calm=True, seconds=pace.alone_s)
                beside = await clients.load({"flood": FLOOD}, calm=True, seconds=pace.beside_s)
            rival.alone_s += alone.calm_s()
            rival.beside_s += beside.calm_s()
            rival.tok_s.append(sum(beside.tokens().values()) / (pace.beside_s - WARM_UP_S))
    async with Clients(rivals[0].server.url, keys) as clients:
        backlogs = dict.fromkeys(WEIGHTS, BACKLOG)
        backlogged = await clients.load(backlogs, calm=False, seconds=pace.shares_s, tokens=SHARE_TOKENS)
    return backlogged.tokens()


class Clients:
    """The tenants' clients of one server."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self._url, self._keys = url, keys

    async def __aenter__(self) -> "Clients":
        connections, forever = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        self._http = aiohttp.ClientSession(self._url, connector=connections, timeout=forever)
        async with self._http.get("/v1/models", headers=self._headers("calm")) as answer:
            self._model = (await answer.json())["data"][0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def load(
        self, backlogs: dict[str, int], *, calm: bool, seconds: float, tokens: tuple[int, int] = TOKENS
    ) -> "Seen":
        """Keep so many requests of each tenant there for `seconds`; return those that have ended, and all calm ones."""
        ended: list[Ended] = []
        stop = asyncio.Event()
        running = [
            asyncio.create_task(self._flood(tenant, number, tokens, ended))
            for tenant, backlog in backlogs.items()
            for number in range(backlog)
        ]
        calm_one = asyncio.create_task(self._calm(ended, stop)) if calm else None
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        stop.set()
        for task in running:
            task.cancel()
        failed = [one for one in await asyncio.gather(*running, return_exceptions=True) if isinstance(one, Exception)]
        if failed:
            raise failed[0]
        if calm_one:
            await calm_one
        await asyncio.sleep(1.0)  # for the engine to end the work of those that were cancelled
        return Seen(ended, began + (WARM_UP_S if backlogs else 0.0), began + seconds)

    async def _flood(self, tenant: str, number: int, tokens: tuple[int, int], ended: list[Ended]) -> None:
        rng = random.Random(f"{SEED} {tenant} {number}")
        while True:
            ended.append(await self._ask(tenant, rng.choice(PROMPTS), rng.randint(*tokens), stream=number % 2 == 0))

    async def _calm(self, ended: list[Ended], stop: asyncio.Event) -> None:
        asked = set()
        for number in itertools.count():
            if stop.is_set():
                break
            prompt = PROMPTS[number % len(PROMPTS)]
            asked.add(asyncio.create_task(self._ask("calm", prompt, CALM_TOKENS, stream=True)))
            await asyncio.sleep(1.0)
        ended += await asyncio.gather(*asked)

    async def _ask(self, tenant: str, prompt: str, tokens: int, *, stream: bool) -> Ended:
        body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        sent, first, last = time.perf_counter(), 0.0, b""
        async with self._http.post("/v1/completions", json=body, headers=self._headers(tenant)) as answer:
            answer.raise_for_status()
            if not stream:
                last = await answer.read()
            else:
                async for line in answer.content:
                    first = first or time.perf_counter()
                    last = line[6:] if line.startswith(b"data: {") else last
        now, usage = time.perf_counter(), json.loads(last)["usage"]
        return Ended(tenant, usage["total_tokens"], sent, first or now, now)

    def _headers(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._keys[tenant]}"}


def case(rival: Rival) -> dict[str, Any]:
    """Return the measurements of one server."""
    return {
        "server": rival.name,
        "alone_s": statistics.median(rival.alone_s),
        "beside_s": statistics.median(rival.beside_s),
        "ratio": statistics.median(rival.beside_s) / statistics.median(rival.alone_s),
        "alone_quantiles_s": quantiles(rival.alone_s),
        "beside_quantiles_s": quantiles(rival.beside_s),
        "tok_s": statistics.median(rival.tok_s),
        "ttft_alone_s": rival.alone_s,
        "ttft_beside_s": rival.beside_s,
        "tok_s_turns": rival.tok_s,
    }


def summarise(cases: list[dict[str, Any]], shares: dict[str, int]) -> dict[str, Any]:
    """Return the headline figures, and their targets."""
    fair, without, stock = cases
    paired = zip(fair["tok_s_turns"], without["tok_s_turns"], strict=True)
    total, weights = sum(shares.values()), sum(WEIGHTS.values())
    errors = [abs(shares[name] / total / (weight / weights) - 1) for name, weight in WEIGHTS.items()]
    return {
        "calm_ttft_alone_s": fair["alone_s"],
        "calm_ttft_beside_flood_s": fair["beside_s"],
        "ratio": fair["ratio"],
        "without_tenants_ratio": without["ratio"],
        "stock_ratio": stock["ratio"],
        "throughput_ratio": statistics.median(one / other for one, other in paired),
        "share_error": max(errors),
        "targets": TARGETS,
    }


def show(cases: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    table = Table("", *(found["server"] for found in cases), title=f"{FLOOD} requests beside one a second")
    for key, unit in (("alone_s", "s"), ("beside_s", "s"), ("ratio", ""), ("tok_s", "")):
        table.add_row(key, *(f"{found[key]:.3g} {unit}" for found in cases))
    console.print(table)
    for key, target in TARGETS.items():
        console.print(f"{key}: {summary[key]:.3g} (target: {target})")


if __name__ == "__main__":
    sys.exit(main())
