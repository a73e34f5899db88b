"""Does swapping adapters under load serve the wrong weights, or cost throughput? Against vLLM's own `load_inplace`.

    python -m benchmarks.swap --out FILE.json [--quick] [--swaps 1000] [--adapters DIR DIR]

One name is swapped between two adapters whose greedy answers differ, every 0.4 seconds, while clients ask it without a
pause, half of them streaming. Every answer is compared with what the version that it names is known to say:

    failed     the request got an error, or was cut off
    mixed      the answer is not that of the version it names, or the stream names several
    throughput completed requests per second while swapping, over those of the steady phases before and after: the
               median of ten blocks of swaps
    rss        the memory of all the server's processes, the last tenth of the swaps over the second tenth

The rival is the same engine's own way: one folder that is written anew, and `load_inplace` from it, with the same
clients. It has one name and no versions, so an answer counts as `mixed` when it is neither adapter's, and as `stale`
when the old adapter answers a request that was sent after the swap had been confirmed.

Both servers run in processes of their own, one after the other. Without --adapters two are trained first (a minute).
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import demo, report
from benchmarks.server import Server, astra_serve, free_port
from trainer.embedded import tasks

SEED, CLIENTS, TOKENS, NAME = 0, 8, 16, "swapped"
EVERY_S = 0.4  # from the start of one swap to that of the next
BLOCKS = 10  # of swaps, with steady load between them
TASKS = ("sql", "signature")
TOKEN = "benchmark"  # noqa: S105
TARGETS = {"failed": 0, "mixed": 0, "throughput_ratio": 0.9, "rss_growth": 1.03}
console = Console()


@dataclass
class Count:
    """What the clients saw."""

    requests: int = 0
    failed: int = 0
    mixed: int = 0
    stale: int = 0
    latencies: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def fault(self, kind: str, example: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {example}"[:300])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="40 swaps: shows that it runs")
    parser.add_argument("--adapters", nargs=2, type=Path, metavar="DIR", help="two LoRAs of the embedded base")
    parser.add_argument("--no-stock", action="store_true", help="without the rival")
    args = parser.parse_args()
    swaps = 40 if args.quick else args.swaps
    env = report.environment(SEED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = args.adapters or _train(folder)
        cases = [asyncio.run(ours(folder, adapters, swaps))]
        if not args.no_stock:
            cases.append(asyncio.run(stock(folder, adapters, swaps)))
    report.write(args.out, summarise(cases), cases, env)
    show(cases)
    return 0


async def ours(folder: Path, adapters: list[Path], swaps: int) -> dict[str, Any]:
    """Start `astra-serve` with an empty document, and swap under load."""
    admin = free_port()
    os.environ["ASTRA_ADMIN_TOKEN"] = TOKEN
    options = ["--base", str(demo.BASE), "--adapters", str(folder / "adapters.yaml"), "--store", str(folder / "store")]
    options += ["--admin-port", str(admin), "--max-loras", "4", "--enforce-eager"]
    with astra_serve(options, folder / "ours.log") as server:
        return await swapped(server, admin, TOKEN, adapters, swaps)


async def swapped(server: Server, admin: int, token: str, adapters: list[Path], swaps: int) -> dict[str, Any]:
    """Swap by publishing two adapters in turn over the admin API, and return what the clients saw."""
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin}", headers=headers, timeout=60) as api:

        async def publish(number: int) -> str:
            answer = await api.put(f"/adapters/{NAME}", json={"source": str(adapters[number % 2])})
            answer.raise_for_status()
            version: str = answer.json()["version"]["name"]
            return version

        known = {}
        for number in (0, 1):
            version = await publish(number)
            known[version] = await _answers(server, version)
        assert len(set(map(tuple, known.values()))) == 2, "the two adapters answer alike: nothing could be seen"

        def judge(count: Count, prompt: int, _sent: float, said: tuple[set[str], str]) -> None:
            names, text = said
            if len(names) != 1 or known.get(next(iter(names)), [])[prompt : prompt + 1] != [text]:
                count.fault("mixed", f"{names} said {text!r}")

        found = await _measure(server, judge, publish, swaps)
        await asyncio.sleep(1)
        state = (await api.get(f"/adapters/{NAME}")).json()
    left = [v["name"] for v in (state["version"], *state["previous"]) if v["residency"] in ("slot", "memory")]
    return {"server": "astra-serve", **found, "left_in_engine": len(left)}


async def stock(folder: Path, adapters: list[Path], swaps: int) -> dict[str, Any]:
    """Swap by writing one folder anew and `load_inplace` from it, as vLLM offers."""
    place = folder / "inplace"
    shutil.copytree(adapters[0], place)
    port = free_port()
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo.BASE), "--enforce-eager"]
    command += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", "64", "--max-loras", "4"]
    command += ["--port", str(port), "--kv-cache-memory-bytes", str(2**30)]
    async with (
        _process(command, environment, folder / "stock.log", port) as server,
        httpx.AsyncClient(base_url=server.url, timeout=60) as api,
    ):
        current = [0]

        async def load(number: int) -> str:
            for file in adapters[number % 2].iterdir():
                shutil.copyfile(file, place / file.name)
            body = {"lora_name": NAME, "lora_path": str(place), "load_inplace": True}
            answer = await api.post("/v1/load_lora_adapter", json=body)
            answer.raise_for_status()
            current[0] = number % 2
            confirmed.append((time.perf_counter(), number % 2))
            return NAME

        confirmed: list[tuple[float, int]] = []
        known = []
        for number in (0, 1):
            await load(number)
            await asyncio.sleep(0.5)
            known.append(await _answers(server, NAME, salt=str(number)))

        def judge(count: Count, prompt: int, sent: float, said: tuple[set[str], str]) -> None:
            _, text = said
            whose = [number for number in (0, 1) if known[number][prompt] == text]
            since = [number for when, number in confirmed if when <= sent][-1:]
            later = {number for when, number in confirmed if when > sent}
            if not whose:
                count.fault("mixed", text)
            elif since and not {*since, *later} & set(whose):
                count.fault("stale", text)

        found = await _measure(server, judge, load, swaps)
        return {"server": "vllm load_inplace", **found, "alive": server.process.poll() is None}


async def _measure(
    server: Server,
    judge: Callable[[Count, int, float, tuple[set[str], str]], None],
    swap: Callable[[int], Any],
    swaps: int,
) -> dict[str, Any]:
    """Blocks of swaps under load, and the same load without swaps between them; what the clients saw of all."""
    count, stop = Count(), asyncio.Event()
    done: list[float] = []
    clients = [asyncio.create_task(_client(server, n, judge, count, done, stop)) for n in range(CLIENTS)]
    await asyncio.sleep(2)
    block, memory, durations, broken = -(-swaps // BLOCKS), [], [], None
    steady_s = min(10.0, block * EVERY_S)
    phases = [time.perf_counter()]  # steady, swapping, steady, swapping, ... steady
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("swapping", total=swaps)
        for number in range(swaps):
            if number % block == 0:
                await asyncio.sleep(steady_s)
                phases.append(time.perf_counter())
            began = time.perf_counter()
            try:
                await swap(number)
            except httpx.HTTPError as error:
                broken = f"swap {number}: {type(error).__name__}: {error}"[:200]
                break
            durations.append(time.perf_counter() - began)
            memory.append(_rss(server.process.pid))
            progress.advance(bar)
            await asyncio.sleep(max(0.0, began + EVERY_S - time.perf_counter()))
            if number % block == block - 1 or number == swaps - 1:
                phases.append(time.perf_counter())
    await asyncio.sleep(steady_s)
    phases.append(time.perf_counter())
    stop.set()
    await asyncio.gather(*clients, return_exceptions=True)
    rates = [sum(a <= t < b for t in done) / (b - a) for a, b in itertools.pairwise(phases)]
    # each block of swaps against the steady load just before and just after it: the machine is not always as fast
    ratios = [rates[i] / ((rates[i - 1] + rates[i + 1]) / 2 or 1) for i in range(1, len(rates) - 1, 2)]
    tenth = max(1, len(memory) // 10)
    late = len(memory) > 2 * tenth
    return {
        "swaps": len(durations),
        "requests": count.requests,
        "failed": count.failed,
        "mixed": count.mixed,
        "stale": count.stale,
        "examples": count.examples,
        "broken": broken,
        "requests_per_s": rates,
        "throughput_ratios": ratios,
        "throughput_ratio": statistics.median(ratios) if ratios else 0.0,
        "swap_s": _quantiles(durations),
        "latency_s": _quantiles(count.latencies),
        "rss_gib": [round(value / 2**30, 4) for value in memory[:: max(1, len(memory) // 200)]],
        "rss_growth": statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth])
        if late
        else None,
    }


async def _client(
    server: Server,
    number: int,
    judge: Callable[[Count, int, float, tuple[set[str], str]], None],
    count: Count,
    done: list[float],
    stop: asyncio.Event,
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for turn in itertools.count():
            if stop.is_set():
                return
            prompt, sent = (number + turn) % len(PROMPTS), time.perf_counter()
            count.requests += 1
            try:
                said = await _ask(client, NAME, PROMPTS[prompt], stream=number % 2 == 0)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                count.fault("failed", f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.05)
                continue
            done.append(time.perf_counter())
            count.latencies.append(done[-1] - sent)
            judge(count, prompt, sent, said)


async def _ask(client: httpx.AsyncClient, model: str, prompt: str, *, stream: bool, salt: str | None = None) -> Any:
    """Return the names that the answer gives itself, and its text. Raises for a status, or an end without a finish."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    if salt is not None:
        body["cache_salt"] = salt  # of the rival's reference answers: its prefix cache may be stale
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        content = answer.json()
        return {content["model"]}, content["choices"][0]["text"]
    names, text, finished = set(), "", False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(chunk["error"])
            names.add(chunk["model"])
            for choice in chunk["choices"]:
                text += choice["text"]
                finished = finished or choice["finish_reason"] is not None
    if not finished:
        raise ValueError("the stream ended without a finish")
    return names, text


async def _answers(server: Server, model: str, salt: str | None = None) -> list[str]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return [(await _ask(client, model, prompt, stream=False, salt=salt))[1] for prompt in PROMPTS]


@contextlib.asynccontextmanager
async def _process(command: list[str], environment: dict[str, str], log: Path, port: int) -> AsyncIterator[Server]:
    with log.open("wb") as stream:
        process = psutil.Popen(command, env=environment, stdout=stream, stderr=stream)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        async with httpx.AsyncClient() as client:
            deadline = time.monotonic() + 240
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{server.url}/health")).is_success:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the rival did not start; see {log.read_text(errors='replace')[-2000:]}")
                await asyncio.sleep(0.5)
        yield server
    finally:
        for child in process.children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def _train(folder: Path) -> list[Path]:
    tasks.write(folder / "data")
    return [demo.train_and_convert(task, folder) for task in TASKS]


def _rss(pid: int) -> int:
    process = psutil.Process(pid)
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the headline figures, and the rival's beside them."""
    keys = ("swaps", "requests", "failed", "mixed", "throughput_ratio", "rss_growth")
    mine = cases[0]
    found: dict[str, Any] = {key: mine[key] for key in keys}
    found["swap_p50_s"], found["swap_p99_s"] = mine["swap_s"].get("p50"), mine["swap_s"].get("p99")
    if len(cases) > 1:
        found["stock"] = {key: cases[1][key] for key in (*keys, "stale", "alive", "broken")}
    return {**found, "targets": TARGETS}


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("", *(case["server"] for case in cases), title=f"{CLIENTS} clients, one name, two adapters")
    for key in ("swaps", "requests", "failed", "mixed", "stale", "throughput_ratio", "rss_growth"):
        table.add_row(key, *(f"{case[key]:.3g}" if isinstance(case[key], float) else str(case[key]) for case in cases))
    for key in ("p50", "p99"):
        table.add_row(f"swap, {key}", *(f"{case['swap_s'].get(key, float('nan')):.3f} s" for case in cases))
    console.print(table)
    for case in cases:
        for line in (*case["examples"], *([case["broken"]] if case["broken"] else [])):
            console.print(f"{case['server']}: {line}", highlight=False, markup=False)


PROMPTS = [row["prompt"] for row in tasks.rows("sql", test=True, n=8, seed=SEED)]


if __name__ == "__main__":
    sys.exit(main())
