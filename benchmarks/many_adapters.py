"""With many adapters and few of them resident: are all answers right, how long are waits, how much throughput is lost?

    python -m benchmarks.many_adapters --out FILE.json [--quick] [--adapter DIR [--base DIR]]

200 adapters, of which 8 can be resident in the engine, and 16 clients that send requests without a pause, half of them
streaming. Clients choose adapters by Zipf's law: the first one gets 200 times as many requests as the last one. The
rival is vLLM's own server with the same adapters and the same number of resident ones, which loads adapters inside the
engine's steps: as it is (`stock`), and with our CPU kernel (`stock_with_kernel`), so that only the handling of adapters
differs.

    wait     seconds from the request to its first token, or to the answer if it is not streamed
    mixed    the answer names another adapter, or equals the answer that another adapter gave without other load

The three servers run side by side and take turns: only one of them has load at a time. The adapters are one trained
adapter plus noise. Without --adapter, that adapter is trained first (half a minute).
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import report
from converter import adapter_dir
from converter.adapter_dir import LoraAdapter
from tests.support import demo
from tests.support.load import Answer, Load, ask, quantiles
from tests.support.server import Server, astra_serve, vllm_serve
from trainer.embedded import tasks

SEED, CLIENTS, TOKENS, RANK = 0, 16, 16, 32
NOISE = 0.5  # added to each lora_B, relative to its standard deviation
console = Console()


@dataclass
class Rival:
    """A server under test, the load on it, and its tokens per second by turn."""

    name: str
    server: Server
    load: Load
    tok_s: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--adapters", type=int, default=200, help="number of adapters (default: 200)")
    parser.add_argument("--places", type=int, default=8, help="resident adapters of every server (default: 8)")
    parser.add_argument("--repetitions", type=int, default=4, help="turns of each server (default: 4)")
    parser.add_argument("--seconds", type=float, default=40, help="seconds per turn (default: 40)")
    parser.add_argument("--quick", action="store_true", help="smoke run: 24 adapters, 4 resident, 6 s")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA of the base")
    parser.add_argument("--base", type=Path, default=demo.BASE, help="(default: the embedded base)")
    args = parser.parse_args()
    if args.base != demo.BASE and not args.adapter:
        parser.error("--base needs --adapter, a LoRA of it")
    if args.quick:
        args.adapters, args.places, args.repetitions, args.seconds = 24, 4, 1, 6.0
    env = report.environment(SEED)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        adapters = make(args.adapter or _train(folder), args.adapters, folder / "adapters")
        rivals = [
            Rival(name, server, Load(server.url, CLIENTS, _pick(list(adapters)), lambda *_: None, TOKENS))
            for name, server in _start(stack, args.base, adapters, args.places, folder)
        ]
        known = asyncio.run(_known_answers(rivals, list(adapters)))
        asyncio.run(measure(rivals, known, args.repetitions, args.seconds))
    cases = [case(rival) for rival in rivals]
    settings = {"adapters": args.adapters, "places": args.places, "clients": CLIENTS}
    report.write(args.out, {**settings, **summarise(cases)}, cases, env)
    show(cases, settings)
    return 0


def make(trained: Path, count: int, folder: Path) -> dict[str, Path]:
    """Write `count` adapters, each `trained` plus its own noise, and return their folders by name."""
    lora = adapter_dir.load_lora(trained)
    found = {}
    for number in track(range(count), "writing adapters", console=console, transient=True):
        torch.manual_seed(number)
        layers = {m: (a, b + NOISE * b.std() * torch.randn_like(b)) for m, (a, b) in lora.layers.items()}
        name = f"a{number:03}"
        with adapter_dir.new_folder(folder / name) as partial:
            base = lora.provenance["base"]
            adapter_dir.save_lora(partial, LoraAdapter(layers, lora.config, {"base": base}, lora.head))
        found[name] = folder / name
    return found


def _start(
    stack: ExitStack, folder_of_base: Path, adapters: dict[str, Path], places: int, folder: Path
) -> list[tuple[str, Server]]:
    """Start the three servers one after the other, and return them by name."""
    base = str(folder_of_base)
    with console.status("starting astra-serve, which loads and probes every adapter once"):
        named = [f"--adapter={name}={path}" for name, path in adapters.items()]
        options = ["--base", base, *named, "--max-loras", str(places), "--resident", str(places), "--enforce-eager"]
        found = [("astra-serve", stack.enter_context(astra_serve(options, folder / "ours.log", timeout_s=600)))]
    options = ["--model", base, "--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(RANK)]
    options += ["--max-loras", str(places), "--max-cpu-loras", str(places), "--enforce-eager", "--lora-modules"]
    options += [f"{name}={path}" for name, path in adapters.items()]
    for name, kernel in (("vllm", "0"), ("vllm with our kernel", "1")):
        with console.status(f"starting {name}"):
            log = folder / f"{kernel}.log"
            found.append((name, stack.enter_context(vllm_serve(options, log, {"ASTRA_CPU_LORA": kernel}))))
    return found


def _pick(names: list[str]) -> Any:
    """Return a function (client, turn) -> (model, prompt) that follows Zipf's law and is the same in every run."""
    weights = [1 / (rank + 1) for rank in range(len(names))]

    def pick(number: int, turn: int) -> tuple[str, str]:
        name = random.Random(f"{SEED} {number} {turn}").choices(names, weights)[0]
        return name, _prompt(name)

    return pick


def _prompt(name: str) -> str:
    return PROMPTS[int(name[1:]) % len(PROMPTS)]


async def _known_answers(rivals: list[Rival], names: list[str]) -> dict[str, set[str]]:
    """Return the answers of each adapter without other load, on all servers: their kernels differ in the last bit."""
    known = defaultdict(set)
    for rival in rivals:
        async with httpx.AsyncClient(base_url=rival.server.url, timeout=120) as client:
            for name in track(names, f"{rival.name}: known answers", console=console, transient=True):
                known[name].add((await ask(client, name, _prompt(name), TOKENS, stream=False)).text)
    return known


async def measure(rivals: list[Rival], known: dict[str, set[str]], repetitions: int, seconds: float) -> None:
    """Load the servers in turn, after a shorter turn as a warm-up, and keep the answers in `rivals`."""

    def judge(model: str, prompt: str, answer: Answer) -> str | None:
        if {name.partition("@")[0] for name in answer.names} != {model}:
            return "mixed"
        others = (known[name] for name in known if name != model and _prompt(name) == prompt)
        return "mixed" if answer.text not in known[model] and any(answer.text in texts for texts in others) else None

    for repetition in track(range(-1, repetitions), "measuring", console=console, transient=True):
        for rival in rivals:
            rival.load.judge = judge
            before, stop = len(rival.load.answers), asyncio.Event()
            running = asyncio.create_task(rival.load.run(stop))
            await asyncio.sleep(seconds if repetition >= 0 else seconds / 4)
            stop.set()
            await running
            new = rival.load.answers[before:]
            if repetition < 0:
                rival.load.answers.clear()
                continue
            took = max(answer.ended for answer in new) - min(answer.sent for answer in new)
            rival.tok_s.append(sum(answer.tokens for answer in new) / took)


def case(rival: Rival) -> dict[str, Any]:
    """Return the measurements of one server."""
    waits = [answer.first - answer.sent for answer in rival.load.answers]
    return {
        "server": rival.name,
        "requests": rival.load.requests,
        **rival.load.faults,
        "examples": rival.load.examples,
        "tok_s": statistics.median(rival.tok_s),
        "tok_s_repetitions": rival.tok_s,
        "mean_wait_s": statistics.mean(waits),
        "wait_s": quantiles(waits),
        "max_over_mean_wait": max(waits) / statistics.mean(waits),
    }


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of `astra-serve`, and those of vLLM under `stock` and `stock_with_kernel`."""
    keys = ("requests", "failed", "mixed", "max_over_mean_wait", "mean_wait_s", "tok_s")
    ours, stock, with_kernel = ({key: found[key] for key in keys} for found in cases)
    paired = zip(cases[0]["tok_s_repetitions"], cases[2]["tok_s_repetitions"], strict=True)
    ratio = statistics.median(one / other for one, other in paired)
    return {**ours, "stock": stock, "stock_with_kernel": with_kernel, "tok_s_over_stock_with_kernel": ratio}


def show(cases: list[dict[str, Any]], settings: dict[str, int]) -> None:
    title = "{adapters} adapters, {places} resident, {clients} clients".format_map(settings)
    table = Table("", *(found["server"] for found in cases), title=title)
    for key in ("requests", "failed", "mixed", "tok_s", "mean_wait_s", "max_over_mean_wait"):
        table.add_row(key, *(f"{f[key]:.3g}" if isinstance(f[key], float) else str(f[key]) for f in cases))
    for key in ("p50", "p99", "max"):
        table.add_row(f"wait, {key}", *(f"{found['wait_s'].get(key, float('nan')):.3f} s" for found in cases))
    console.print(table)
    for found in cases:
        for line in found["examples"]:
            console.print(f"{found['server']}: {line}", highlight=False, markup=False)


def _train(folder: Path) -> Path:
    tasks.write(folder / "data")
    return demo.train_and_convert("sql", folder)


PROMPTS = [row["prompt"] for row in tasks.rows("sql", test=True, n=8, seed=SEED)]


if __name__ == "__main__":
    sys.exit(main())
