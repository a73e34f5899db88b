"""How long does a server take to start, and how much memory does it use?

    python -m benchmarks.start --base DIR --out FILE.json [--adapter DIR] [--repeats 3]

The servers start in turn, each on all cores: `astra-serve` for the first time (compiled, with an empty cache), again
with that cache, and with --enforce-eager; and vLLM's own server for the same base, for the first time and again. The
seconds end when /health answers; `engine_s` is the part in which the engine compiles and warms up, from its log. The
memory is the proportional set size of each process after a completion; it includes the cache of keys and values,
1 GiB in all servers.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import report
from tests.support.server import Server, astra_serve, vllm_serve

KINDS = ("first", "again", "eager", "vllm first", "vllm again")
ENGINE = re.compile(r"init engine .* took ([\d.]+) s")
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="a model folder")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA that our servers serve; vLLM's serves none")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    env = report.environment(0)
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in track(range(args.repeats * len(KINDS)), "starting", console=console, transient=True):
            turn, kind = number // len(KINDS), KINDS[number % len(KINDS)]
            cases.append({"kind": kind, "turn": turn} | started(kind, args.base, args.adapter, Path(temporary), turn))
    summary = summarise(cases)
    report.write(args.out, summary, cases, env)
    table = Table("server", "seconds to ready", "of these, the engine's", "memory, GiB", title=str(args.base.name))
    for kind in KINDS:
        figures = (f"{summary[f'{kind}.{key}']:.1f}" for key in ("ready_s", "engine_s", "memory_gib"))
        table.add_row(kind, *figures)
    console.print(table)
    return 0


def started(kind: str, base: Path, adapter: Path | None, folder: Path, turn: int) -> dict[str, Any]:
    """Start a server, and return its seconds and its memory by process."""
    ours = not kind.startswith("vllm")
    log = folder / f"{kind}-{turn}.log"
    environment = {"VLLM_CACHE_ROOT": str(folder / f"cache-{'ours' if ours else 'vllm'}-{turn}")}
    server: AbstractContextManager[Server]
    began = time.monotonic()
    if ours:
        options = ["--base", str(base), *(["--adapter", f"a={adapter}"] if adapter else [])]
        options += ["--enforce-eager"] if kind == "eager" else []
        server = astra_serve(options, log, timeout_s=900, environment=environment)
    else:
        environment["ASTRA_CPU_LORA"] = "0"
        server = vllm_serve(["--model", str(base)], log, environment, timeout_s=900)
    with server as running:
        ready = time.monotonic() - began
        model = httpx.get(f"{running.url}/v1/models", timeout=60).json()["data"][-1]["id"]
        body = {"model": model, "prompt": "Once", "max_tokens": 8}
        httpx.post(f"{running.url}/v1/completions", json=body, timeout=120).raise_for_status()
        memory = memory_of(running.process.pid)
    engine = ENGINE.search(log.read_text(errors="replace"))
    return {
        "ready_s": round(ready, 1),
        "engine_s": float(engine[1]) if engine else None,
        "memory_gib": round(sum(memory.values()), 2),
        "processes_gib": memory,
    }


def memory_of(pid: int) -> dict[str, float]:
    """Return the proportional set size (GiB) of a process and its children by their names, the smallest left out."""
    parent = psutil.Process(pid)
    found = {}
    for process in (parent, *parent.children(recursive=True)):
        size = process.memory_full_info().pss / 2**30
        if size > 0.05:
            found[process.name() if process is not parent else "server"] = round(size, 2)
    return found


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure by kind, and how much sooner the second start is ready than the first."""
    summary: dict[str, Any] = {}
    for kind in KINDS:
        for key in ("ready_s", "engine_s", "memory_gib"):
            values = [case[key] for case in cases if case["kind"] == kind]
            summary[f"{kind}.{key}"] = round(statistics.median(values), 2)
    by_turn = {(case["kind"], case["turn"]): case["ready_s"] for case in cases}
    turns = {turn for _, turn in by_turn}
    ratios = {
        name: statistics.median(by_turn[one, turn] / by_turn[other, turn] for turn in turns)
        for name, one, other in (
            ("again_vs_first", "again", "first"),
            ("again_vs_eager", "again", "eager"),
            ("again_vs_vllm_again", "again", "vllm again"),
        )
    }
    return summary | {name: round(ratio, 3) for name, ratio in ratios.items()}


if __name__ == "__main__":
    sys.exit(main())
