"""Does a swap of adapters under load give wrong answers, or cost throughput? Compared with vLLM's `load_inplace`.

    python -m benchmarks.swap --out FILE.json [--quick] [--swaps 1000] [--every 1] [--adapters DIR DIR [--base DIR]]

One public name is swapped between two adapters whose greedy answers differ, once a second, while clients request it
without a pause, half of them streaming. Every answer is compared with the known answer of the version that it names
(`tests.support.load` lists the kinds of wrong answers); the prompts are those for which both adapters' greedy answers
do not depend on rounding (each token leads the next likely one by at least 0.3 nats). Also measured:

    throughput  completed requests per second while swapping, divided by those of the steady phases before and after:
                the median over forty blocks of swaps
    rss         memory of all processes of the server: the last tenth of the swaps divided by the second tenth
    first       seconds from the publishing call to the first token of a request that was sent after the call and that
                the new version answers; beside it the server's own times of the parts

The rivals are vLLM's own two ways with the same clients:

    load_inplace   one folder whose files are replaced, then `load_inplace` from it. It has one name and no versions, so
                   an answer counts as `mixed` when it is neither adapter's
    new names      the way that is used: load under a new name, let the clients ask for it, unload the old name. Every
                   client must know the new name; in the benchmark all of them do at once. An answer counts as `mixed`
                   when it is not that of the adapter that the request asked for

The servers run one after the other, in processes of their own. Without --adapters, two adapters are trained first
(a minute).
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import report
from tests.support import demo
from tests.support.load import Answer
from tests.support.server import astra_serve, free_port, vllm_serve
from tests.support.swap import CLIENTS, NAME, SEED, Pace, common, known_answers, measure, swapped, train_adapters

# Under any load the engine's worker grows by 200 MB in the first minute: the first swap comes after it.
WARM_UP_S = 60.0
TOKEN = "benchmark"  # noqa: S105
RUNTIME_LORAS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
TARGETS = {"failed": 0, "mixed": 0, "throughput_ratio": 0.9, "rss_growth": 1.03}
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--swaps", type=int, default=1000, help="number of swaps (default: 1000)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one swap to the next (default: 1)")
    parser.add_argument("--quick", action="store_true", help="smoke run: 40 swaps, 2 s of warm-up")
    parser.add_argument("--adapters", nargs=2, type=Path, metavar="DIR", help="two LoRAs of the base")
    parser.add_argument("--base", type=Path, default=demo.BASE, help="(default: the embedded base)")
    parser.add_argument("--no-stock", action="store_true", help="do not measure the rivals")
    args = parser.parse_args()
    if args.base != demo.BASE and not args.adapters:
        parser.error("--base needs --adapters, two LoRAs of it")
    pace = Pace(40, args.every, 2.0) if args.quick else Pace(args.swaps, args.every, WARM_UP_S)
    env = report.environment(SEED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = args.adapters or train_adapters(folder)
        cases = [asyncio.run(ours(folder, args.base, adapters, pace))]
        if not args.no_stock:
            cases.append(asyncio.run(stock(folder, args.base, adapters, pace)))
            cases.append(asyncio.run(stock_new_names(folder, args.base, adapters, pace)))
    report.write(args.out, summarise(cases), cases, env)
    show(cases)
    return 0


async def ours(folder: Path, base: Path, adapters: list[Path], pace: Pace) -> dict[str, Any]:
    """Start `astra-serve` with an empty document, swap under load, and return the measurements."""
    admin = free_port()
    os.environ["ASTRA_ADMIN_TOKEN"] = TOKEN
    options = ["--base", str(base), "--adapters", str(folder / "adapters.yaml"), "--store", str(folder / "store")]
    options += ["--admin-port", str(admin), "--max-loras", "4", "--enforce-eager"]
    with astra_serve(options, folder / "ours.log") as server:
        return await swapped(server, admin, TOKEN, adapters, pace)


async def stock(folder: Path, base: Path, adapters: list[Path], pace: Pace) -> dict[str, Any]:
    """Start vLLM's server, swap by replacing one folder's files and `load_inplace`, and return the measurements."""
    place = folder / "inplace"
    shutil.copytree(adapters[0], place)
    confirmed: list[tuple[float, int]] = []  # time of each confirmed swap, and the adapter's number
    with vllm_serve(_stock_options(base), folder / "stock.log", RUNTIME_LORAS) as server:
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
                known.append(await known_answers(server, NAME, salt=str(number)))

            def judge(_: str, prompt: str, answer: Answer) -> str | None:
                matching = {number for number in (0, 1) if known[number].get(prompt) == answer.text}
                at_start = [number for when, number in confirmed if when <= answer.sent][-1:]
                later = {number for when, number in confirmed if when > answer.sent}
                if not matching:
                    return "mixed"
                return "stale" if at_start and not {*at_start, *later} & matching else None

            found = await measure(server, judge, load, pace, common(known))
            return {"server": "vllm load_inplace", **found, "alive": server.process.poll() is None}


async def stock_new_names(folder: Path, base: Path, adapters: list[Path], pace: Pace) -> dict[str, Any]:
    """Start vLLM's server, swap by a new name for the clients each time, and return the measurements."""
    with vllm_serve(_stock_options(base), folder / "names.log", RUNTIME_LORAS) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as api:
            names: list[str] = []  # in the order of their loads; requests ask for the newest

            async def swap(number: int) -> str:
                body = {"lora_name": f"{NAME}-v{len(names)}", "lora_path": str(adapters[number % 2])}
                (await api.post("/v1/load_lora_adapter", json=body)).raise_for_status()
                names.append(body["lora_name"])
                if len(names) > 1:
                    (await api.post("/v1/unload_lora_adapter", json={"lora_name": names[-2]})).raise_for_status()
                return names[-1]

            known: dict[str, dict[str, str]] = {}
            for number in (0, 1):
                known[str(number)] = await known_answers(server, await swap(number))

            def judge(model: str, prompt: str, answer: Answer) -> str | None:
                number = int(model.removeprefix(f"{NAME}-v")) % 2
                right = answer.names == {model} and known[str(number)].get(prompt) == answer.text
                return None if right else "mixed"

            found = await measure(server, judge, swap, pace, common(known.values()), lambda: names[-1])
            return {"server": "vllm new names", **found, "alive": server.process.poll() is None}


def _stock_options(base: Path) -> list[str]:
    options = ["--model", str(base), "--enforce-eager", "--served-model-name", "base", "--enable-lora"]
    return [*options, "--max-lora-rank", "64", "--max-loras", "4"]


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the headline figures of `astra-serve`, with the rivals' under `stock` and `stock_new_names`."""
    keys = ("swaps", "every_s", "requests", "failed", "mixed", "throughput_ratio", "rss_growth")
    mine = cases[0]
    found: dict[str, Any] = {key: mine[key] for key in keys}
    for key in ("swap_s", "first_token_s"):
        found[f"{key.removesuffix('_s')}_p50_s"], found[f"{key.removesuffix('_s')}_p99_s"] = (
            mine[key].get("p50"), mine[key].get("p99"),
        )  # fmt: skip
    found["parts_p50_s"] = {part: seconds.get("p50") for part, seconds in mine["parts_s"].items()}
    found["parts_p99_s"] = {part: seconds.get("p99") for part, seconds in mine["parts_s"].items()}
    for name, case in zip(("stock", "stock_new_names"), cases[1:], strict=False):
        found[name] = {key: case[key] for key in (*keys, "stale", "alive", "broken")}
        found[name] |= {f"{key}_p50_s": case[f"{key}_s"].get("p50") for key in ("swap", "first_token")}
    return {**found, "targets": TARGETS}


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("", *(case["server"] for case in cases), title=f"{CLIENTS} clients, one name, two adapters")
    for key in ("swaps", "requests", "failed", "mixed", "stale", "throughput_ratio", "rss_growth"):
        table.add_row(key, *(f"{case[key]:.3g}" if isinstance(case[key], float) else str(case[key]) for case in cases))
    for name, key in (("publishing call", "swap_s"), ("call to first token of the new version", "first_token_s")):
        for p in ("p50", "p99"):
            table.add_row(f"{name}, {p}", *(f"{case[key].get(p, float('nan')):.3f} s" for case in cases))
    for part, seconds in cases[0].get("parts_s", {}).items():
        table.add_row(f"  {part}, p50 / p99", f"{seconds.get('p50', 0):.4f} / {seconds.get('p99', 0):.4f} s")
    console.print(table)
    for case in cases:
        for line in (*case["examples"], *([case["broken"]] if case["broken"] else [])):
            console.print(f"{case['server']}: {line}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
