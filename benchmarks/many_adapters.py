"""Many adapters over few places: does every request get its adapter, how long does the unluckiest wait, what is lost?

    python -m benchmarks.many_adapters --out FILE.json [--quick] [--adapter DIR]

200 adapters, 8 places for them in the engine, and 16 clients without a pause, half of them streaming, that pick one by
Zipf's law: the first is asked for 200 times as often as the last. Against vLLM's own server with the same adapters
and places, which swaps them inside the engine's steps: once as it is (`stock`), and once with our CPU kernel
(`stock_with_kernel`), which leaves the handling of adapters as the only difference.

    wait     from the request to its first token (of an answer that is not streamed: to the answer)
    mixed    the answer names another adapter, or is what another one said when it was asked alone

The three servers run side by side, and are asked in turn: one at a time, several times. The adapters are one trained
adapter with noise of its own each. Without --adapter it is trained first (half a minute).
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
NOISE = 0.5  # of each factor's own standard deviation, on lora_B
console = Console()


@dataclass
class Rival:
    """A server under test, and what its clients saw."""

    name: str
    server: Server
    load: Load
    tok_s: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--places", type=int, default=8, help="--max-loras and --resident of ours, both vLLM's")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=40, help="of each repetition")
    parser.add_argument("--quick", action="store_true", help="24 adapters over 4 places, 6 s: shows that it runs")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA of the embedded base")
    args = parser.parse_args()
    if args.quick:
        args.adapters, args.places, args.repetitions, args.seconds = 24, 4, 1, 6.0
    env = report.environment(SEED)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        adapters = make(args.adapter or _train(folder), args.adapters, folder / "adapters")
        rivals = [
            Rival(name, server, Load(server.url, CLIENTS, _pick(list(adapters)), lambda *_: None, TOKENS))
            for name, server in _start(stack, adapters, args.places, folder)
        ]
        said = asyncio.run(_alone(rivals, list(adapters)))
        asyncio.run(measure(rivals, said, args.repetitions, args.seconds))
    cases = [case(rival) for rival in rivals]
    settings = {"adapters": args.adapters, "places": args.places, "clients": CLIENTS}
    report.write(args.out, {**settings, **summarise(cases)}, cases, env)
    show(cases, settings)
    return 0


def make(trained: Path, count: int, folder: Path) -> dict[str, Path]:
    """Write `count` adapters, each `trained` with noise of its own, and return their folders by name."""
    known = adapter_dir.load_lora(trained)
    found = {}
    for number in track(range(count), "writing adapters", console=console, transient=True):
        torch.manual_seed(number)
        layers = {m: (a, b + NOISE * b.std() * torch.randn_like(b)) for m, (a, b) in known.layers.items()}
        name = f"a{number:03}"
        with adapter_dir.new_folder(folder / name) as partial:
            base = known.provenance["base"]
            adapter_dir.save_lora(partial, LoraAdapter(layers, known.config, {"base": base}, known.head))
        found[name] = folder / name
    return found


def _start(stack: ExitStack, adapters: dict[str, Path], places: int, folder: Path) -> list[tuple[str, Server]]:
    """Start the three servers, one after the other."""
    base = str(demo.BASE)
    with console.status("starting astra-serve, which reads and proves every adapter once"):
        given = [f"--adapter={name}={path}" for name, path in adapters.items()]
        options = ["--base", base, *given, "--max-loras", str(places), "--resident", str(places), "--enforce-eager"]
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
    """Return what a client asks at a turn, the same in every run: Zipf's law, a prompt per adapter."""
    weights = [1 / (rank + 1) for rank in range(len(names))]

    def pick(number: int, turn: int) -> tuple[str, str]:
        name = random.Random(f"{SEED} {number} {turn}").choices(names, weights)[0]
        return name, _prompt(name)

    return pick


def _prompt(name: str) -> str:
    return PROMPTS[int(name[1:]) % len(PROMPTS)]


async def _alone(rivals: list[Rival], names: list[str]) -> dict[str, set[str]]:
    """Return what each adapter says when nobody else asks, on any of the servers: kernels differ in the last bit."""
    said = defaultdict(set)
    for rival in rivals:
        async with httpx.AsyncClient(base_url=rival.server.url, timeout=120) as client:
            for name in track(names, f"{rival.name}: each adapter alone", console=console, transient=True):
                said[name].add((await ask(client, name, _prompt(name), TOKENS, stream=False)).text)
    return said


async def measure(rivals: list[Rival], said: dict[str, set[str]], repetitions: int, seconds: float) -> None:
    """Ask the servers in turn. A first, shorter turn of each is warm-up."""

    def judge(model: str, prompt: str, answer: Answer) -> str | None:
        if {name.partition("@")[0] for name in answer.names} != {model}:
            return "mixed"
        others = (said[name] for name in said if name != model and _prompt(name) == prompt)
        return "mixed" if answer.text not in said[model] and any(answer.text in texts for texts in others) else None

    for repetition in track(range(-1, repetitions), "asking", console=console, transient=True):
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
    """Return ours, and the rivals' under keys of their own."""
    keys = ("requests", "failed", "mixed", "max_over_mean_wait", "mean_wait_s", "tok_s")
    ours, stock, with_kernel = ({key: found[key] for key in keys} for found in cases)
    paired = zip(cases[0]["tok_s_repetitions"], cases[2]["tok_s_repetitions"], strict=True)
    ratio = statistics.median(one / other for one, other in paired)
    return {**ours, "stock": stock, "stock_with_kernel": with_kernel, "tok_s_over_stock_with_kernel": ratio}


def show(cases: list[dict[str, Any]], settings: dict[str, int]) -> None:
    title = "{adapters} adapters, {places} places, {clients} clients".format_map(settings)
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
