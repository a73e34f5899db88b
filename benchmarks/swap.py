"""Does swapping adapters under load serve the wrong weights, or cost throughput? Against vLLM's own `load_inplace`.

    python -m benchmarks.swap --out FILE.json [--quick] [--swaps 1000] [--every 1] [--adapters DIR DIR]

One name is swapped between two adapters whose greedy answers differ, once a second, while clients ask it without a
pause, half of them streaming. Every answer is compared with what the version that it names is known to say
(`benchmarks.load` has the kinds of wrong answers). Beside that:

    throughput completed requests per second while swapping, over those of the steady phases before and after: the
               median of forty blocks of swaps
    rss        the memory of all the server's processes, the last tenth of the swaps over the second tenth
    first      from the publishing call to the first token of a request that came after it and that the new version
               answers; the server's own times of its parts beside it

The rival is the same engine's own way: one folder that is written anew, and `load_inplace` from it, with the same
clients. It has one name and no versions, so an answer counts as `mixed` when it is neither adapter's.

Both servers run in processes of their own, one after the other. Without --adapters two are trained first (a minute).
"""

import argparse
import asyncio
import bisect
import contextlib
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import demo, report
from benchmarks.load import Answer, Load, ask, quantiles
from benchmarks.server import Server, astra_serve, free_port, vllm_serve
from trainer.embedded import tasks

SEED, CLIENTS, TOKENS, NAME = 0, 8, 16, "swapped"
# Of load before the first swap: the engine's worker grows by 200 MB in its first minute, whatever it is asked.
WARM_UP_S = 60.0
BLOCKS = 40  # of swaps, with steady load between them: the machine's speed wanders, the two must be close in time
STEADY_S = 5.0
TASKS = ("sql", "intent")
TOKEN = "benchmark"  # noqa: S105
TARGETS = {"failed": 0, "mixed": 0, "throughput_ratio": 0.9, "rss_growth": 1.03}
PARTS = ("fetching", "verifying", "loading", "probing")  # of a swap, as the server names them
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one swap to the next (default: 1)")
    parser.add_argument("--quick", action="store_true", help="40 swaps, no warm-up: shows that it runs")
    parser.add_argument("--adapters", nargs=2, type=Path, metavar="DIR", help="two LoRAs of the embedded base")
    parser.add_argument("--no-stock", action="store_true", help="without the rival")
    args = parser.parse_args()
    pace = Pace(40, args.every, 2.0) if args.quick else Pace(args.swaps, args.every, WARM_UP_S)
    env = report.environment(SEED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = args.adapters or _train(folder)
        cases = [asyncio.run(ours(folder, adapters, pace))]
        if not args.no_stock:
            cases.append(asyncio.run(stock(folder, adapters, pace)))
    report.write(args.out, summarise(cases), cases, env)
    show(cases)
    return 0


@dataclass(frozen=True)
class Pace:
    """How many swaps, how often, and after how long."""

    swaps: int
    every_s: float  # from the start of one to that of the next
    warm_up_s: float


async def ours(folder: Path, adapters: list[Path], pace: Pace) -> dict[str, Any]:
    """Start `astra-serve` with an empty document, and swap under load."""
    admin = free_port()
    os.environ["ASTRA_ADMIN_TOKEN"] = TOKEN
    options = ["--base", str(demo.BASE), "--adapters", str(folder / "adapters.yaml"), "--store", str(folder / "store")]
    options += ["--admin-port", str(admin), "--max-loras", "4", "--enforce-eager"]
    with astra_serve(options, folder / "ours.log") as server:
        return await swapped(server, admin, TOKEN, adapters, pace)


async def swapped(server: Server, admin: int, token: str, adapters: list[Path], pace: Pace) -> dict[str, Any]:
    """Swap by publishing two adapters in turn over the admin API, and return what the clients saw."""
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
            known[version] = await _answers(server, version)
        assert len({tuple(said.values()) for said in known.values()}) == 2, (
            "the two adapters answer alike: nothing could be seen"
        )

        def judge(_: str, prompt: str, answer: Answer) -> str | None:
            (name,) = answer.names if len(answer.names) == 1 else ("",)
            return None if known.get(name, {}).get(prompt) == answer.text else "mixed"

        found = await _measure(server, judge, publish, pace)
        await asyncio.sleep(1)
        state = (await api.get(f"/adapters/{NAME}")).json()
    left = [v["name"] for v in (state["version"], *state["previous"]) if v["residency"] in ("slot", "memory")]
    of_parts = {part: quantiles(seconds[2:]) for part, seconds in parts.items()}
    return {"server": "astra-serve", **found, "parts_s": of_parts, "left_in_engine": len(left)}


async def stock(folder: Path, adapters: list[Path], pace: Pace) -> dict[str, Any]:
    """Swap by writing one folder anew and `load_inplace` from it, as vLLM offers."""
    place = folder / "inplace"
    shutil.copytree(adapters[0], place)
    options = ["--model", str(demo.BASE), "--enforce-eager", "--served-model-name", "base", "--enable-lora"]
    options += ["--max-lora-rank", "64", "--max-loras", "4"]
    confirmed: list[tuple[float, int]] = []
    with vllm_serve(options, folder / "stock.log", {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as api:

            async def load(number: int) -> str:
                for file in adapters[number % 2].iterdir():
                    shutil.copyfile(file, place / file.name)
                body = {"lora_name": NAME, "lora_path": str(place), "load_inplace": True}
                answer = await api.post("/v1/load_lora_adapter", json=body)
                answer.raise_for_status()
                confirmed.append((time.perf_counter(), number % 2))
                return NAME

            known = []
            for number in (0, 1):
                await load(number)
                await asyncio.sleep(0.5)
                known.append(await _answers(server, NAME, salt=str(number)))

            def judge(_: str, prompt: str, answer: Answer) -> str | None:
                whose = {number for number in (0, 1) if known[number][prompt] == answer.text}
                since = [number for when, number in confirmed if when <= answer.sent][-1:]
                later = {number for when, number in confirmed if when > answer.sent}
                if not whose:
                    return "mixed"
                return "stale" if since and not {*since, *later} & whose else None

            found = await _measure(server, judge, load, pace)
            return {"server": "vllm load_inplace", **found, "alive": server.process.poll() is None}


async def _measure(
    server: Server,
    judge: Callable[[str, str, Answer], str | None],
    swap: Callable[[int], Awaitable[str]],
    pace: Pace,
) -> dict[str, Any]:
    """Blocks of swaps under load, and the same load without swaps between them; what the clients saw of all."""
    load = Load(
        server.url, CLIENTS, lambda number, turn: (NAME, PROMPTS[(number + turn) % len(PROMPTS)]), judge, TOKENS
    )
    stop = asyncio.Event()
    running = asyncio.create_task(load.run(stop))
    await asyncio.sleep(pace.warm_up_s)
    block, memory, broken = -(-pace.swaps // BLOCKS), [], None
    done: list[tuple[float, float, str]] = []  # each swap's begin, its end, and the name that answers have since
    steady_s = min(STEADY_S, block * pace.every_s)
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    phases = [time.perf_counter()]  # steady, swapping, steady, swapping, ... steady
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("swapping", total=pace.swaps)
        for number in range(pace.swaps):
            if number % block == 0:
                await asyncio.sleep(steady_s)
                phases.append(time.perf_counter())
            began = time.perf_counter()
            try:
                name = await swap(number)
            except httpx.HTTPError as error:
                broken = f"swap {number}: {type(error).__name__}: {error}"[:200]
                break
            done.append((began, time.perf_counter(), name))
            memory.append(_rss(family))
            progress.advance(bar)
            await asyncio.sleep(max(0.0, began + pace.every_s - time.perf_counter()))
            if number % block == block - 1 or number == pace.swaps - 1:
                phases.append(time.perf_counter())
    await asyncio.sleep(steady_s)
    phases.append(time.perf_counter())
    stop.set()
    await running
    rates = [sum(a <= answer.ended < b for answer in load.answers) / (b - a) for a, b in itertools.pairwise(phases)]
    # each block of swaps against the steady load just before and just after it: the machine is not always as fast
    ratios = [rates[i] / ((rates[i - 1] + rates[i + 1]) / 2 or 1) for i in range(1, len(rates) - 1, 2)]
    tenth = max(1, len(memory) // 10)
    late = len(memory) > 2 * tenth
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
        if late
        else None,
    }


def _first_tokens(done: list[tuple[float, float, str]], answers: list[Answer]) -> list[float]:
    """Return for each swap, to a name of its own, how long after its call that name first said something."""
    by_sent = sorted(answers, key=lambda answer: answer.sent)
    starts = [answer.sent for answer in by_sent]
    found = []
    for number, (began, _, name) in enumerate(done):
        until = done[number + 1][0] if number + 1 < len(done) else float("inf")
        after = by_sent[bisect.bisect(starts, began) : bisect.bisect(starts, until)]
        found += sorted(answer.first - began for answer in after if answer.names == {name})[:1]
    return found


async def _answers(server: Server, model: str, salt: str | None = None) -> dict[str, str]:
    """Return what `model` says after each prompt; with a `salt` past the rival's prefix cache, which may be stale."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return {p: (await ask(client, model, p, TOKENS, stream=False, salt=salt)).text for p in PROMPTS}


def _train(folder: Path) -> list[Path]:
    tasks.write(folder / "data")
    return [demo.train_and_convert(task, folder) for task in TASKS]


def _rss(family: list[psutil.Process]) -> int:
    total = 0
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the headline figures, and the rival's beside them."""
    keys = ("swaps", "every_s", "requests", "failed", "mixed", "throughput_ratio", "rss_growth")
    mine = cases[0]
    found: dict[str, Any] = {key: mine[key] for key in keys}
    for key in ("swap_s", "first_token_s"):
        found[f"{key.removesuffix('_s')}_p50_s"], found[f"{key.removesuffix('_s')}_p99_s"] = (
            mine[key].get("p50"), mine[key].get("p99"),
        )  # fmt: skip
    found["parts_p50_s"] = {part: seconds.get("p50") for part, seconds in mine["parts_s"].items()}
    found["parts_p99_s"] = {part: seconds.get("p99") for part, seconds in mine["parts_s"].items()}
    if len(cases) > 1:
        found["stock"] = {key: cases[1][key] for key in (*keys, "stale", "alive", "broken")}
    return {**found, "targets": TARGETS}


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("", *(case["server"] for case in cases), title=f"{CLIENTS} clients, one name, two adapters")
    for key in ("swaps", "requests", "failed", "mixed", "stale", "throughput_ratio", "rss_growth"):
        table.add_row(key, *(f"{case[key]:.3g}" if isinstance(case[key], float) else str(case[key]) for case in cases))
    for name, key in (("publishing call", "swap_s"), ("to the first new token", "first_token_s")):
        for p in ("p50", "p99"):
            table.add_row(f"{name}, {p}", *(f"{case[key].get(p, float('nan')):.3f} s" for case in cases))
    for part, seconds in cases[0].get("parts_s", {}).items():
        table.add_row(f"  {part}, p50 / p99", f"{seconds.get('p50', 0):.4f} / {seconds.get('p99', 0):.4f} s")
    console.print(table)
    for case in cases:
        for line in (*case["examples"], *([case["broken"]] if case["broken"] else [])):
            console.print(f"{case['server']}: {line}", highlight=False, markup=False)


PROMPTS = [row["prompt"] for row in tasks.rows("sql", test=True, n=8, seed=SEED)]


if __name__ == "__main__":
    sys.exit(main())
