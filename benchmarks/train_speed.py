"""How much time and memory does Astra's exact form add to a training step, compared with PEFT's LoRA of the same rank?

    python -m benchmarks.train_speed --out FILE.json [--quick] [--models embedded wide] [--device cpu|cuda]

A step is forward, backward, clipping and AdamW on one batch of random tokens. `lora` is PEFT's plain LoRA, `ours` is
the form that `astra-train` uses for s (B A - B0 A0) x, `autograd` the same products with autograd's backward pass.

The forms take turns of a few steps, each with a model of its own. A ratio is the median of the ratios of the turns.
Peak memory is measured in a process per form: the kernel's high-water mark (GPU: the allocator's) during steps,
including the model and excluding imports.
"""

import argparse
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks import peak_memory, report
from trainer.adapter import ADAPTER, attach, target_layers
from trainer.config import TrainConfig
from trainer.embedded import pretrain
from trainer.exact_start import ExactStart
from trainer.start.methods import astra_start

RANK, SEED, TURNS, STEPS = 16, 0, 7, 2
TARGETS = {"steps_ratio": 0.95, "memory_ratio": 1.05}
ROWS = {"embedded": (16, 128), "wide": (4, 128)}  # (rows, tokens per row) of the batch
console = Console()


class Autograd(ExactStart):
    """The same two products as ours; autograd saves the tensors for the backward pass."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        a, b = module.lora_A[active_adapter].standard(), module.lora_B[active_adapter].standard()
        return result + module.scaling[active_adapter] * F.linear(F.linear(x.to(a.dtype), a), b)


FORMS = ("lora", "ours", "autograd")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--models", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="default: both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="smoke run: the embedded base, two turns")
    args = parser.parse_args()
    models, turns = (["embedded"], 2) if args.quick else (args.models, TURNS)
    cases = []
    for model in models:
        seconds = measure_steps(model, args.device, turns)
        peaks = {form: in_a_process(model, form, args.device) for form in FORMS}
        cases += [case(model, form, seconds, peaks) for form in FORMS]
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report.write(args.out, summarise(cases), cases, report.environment(SEED, device))
    show(cases)
    return 0


def build(model: str, form: str, device: str) -> tuple[nn.Module, Callable[[], None]]:
    """Return a model with its adapter, and a function that performs one training step."""
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    base = (embedded() if model == "embedded" else wide()).to(device).requires_grad_(False)
    config = TrainConfig(rank=RANK)
    layers = target_layers(base, config)
    adapted: nn.Module
    if form == "lora":
        names = sorted({name.rpartition(".")[2] for name in layers})
        adapted = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    else:
        bases = {n: torch.linalg.qr(torch.randn(layer.out_features, RANK)).Q for n, layer in layers.items()}
        adapted = attach(
            base, {name: astra_start(layers[name].weight.detach(), q) for name, q in bases.items()}, config
        )
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer) and form == "autograd":
                layer.lora_variant[ADAPTER] = Autograd()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(5, 1000, ROWS[model], device=device)

    def step() -> None:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return adapted.train(), step


def embedded() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(Path(pretrain.__file__).parent / "base")


def wide() -> PreTrainedModel:
    """Return two layers with the widths of Llama-3-8B, bfloat16: 436 M parameters in linear layers."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=1024, tie_word_embeddings=True,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def measure_steps(model: str, device: str, turns: int) -> dict[str, list[float]]:
    """Return the seconds per step of every turn, by form."""
    steps = {form: build(model, form, device)[1] for form in FORMS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in track(range(turns), f"{model}: steps", console=console):
        for form, step in steps.items():
            synchronise(device)
            started = time.perf_counter()
            for _ in range(STEPS):
                step()
            synchronise(device)
            seconds[form].append((time.perf_counter() - started) / STEPS)
    return seconds


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_a_process(model: str, form: str, device: str) -> int:
    """Return the peak memory of training steps in a process of their own, in bytes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, model, form, device).result()


def peak(model: str, form: str, device: str) -> int:
    """Return the peak memory of the model and two training steps, in bytes."""
    before = peak_memory.current_bytes()
    _, step = build(model, form, device)
    gc.collect()
    peak_memory.reset_peak()
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory.peak_bytes() - before


def case(model: str, form: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """Return the figures of one form; ratios of steps per second and of memory are relative to plain LoRA."""
    pairs = zip(seconds["lora"], seconds[form], strict=True)
    return {
        "model": model,
        "form": form,
        "steps_per_second": 1 / statistics.median(seconds[form]),
        "steps_ratio": statistics.median(lora / other for lora, other in pairs),
        "peak_gib": peaks[form] / 2**30,
        "memory_ratio": peaks[form] / peaks["lora"],
        "seconds": seconds[form],
    }


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of `ours`: by model, and the worse of them as the headline."""
    ours = [found for found in cases if found["form"] == "ours"]
    summary: dict[str, Any] = {
        "steps_ratio": min(found["steps_ratio"] for found in ours),
        "memory_ratio": max(found["memory_ratio"] for found in ours),
        "targets": TARGETS,
    }
    for found in ours:
        summary |= {f"{found['model']}.{key}": found[key] for key in ("steps_ratio", "memory_ratio")}
    return summary


def show(cases: list[dict[str, Any]]) -> None:
    table = Table("model", "form", "steps/s", "against LoRA", "peak GiB", "against LoRA", title="training steps")
    for found in cases:
        figures = (found[key] for key in ("steps_per_second", "steps_ratio", "peak_gib", "memory_ratio"))
        table.add_row(found["model"], found["form"], *(f"{figure:.3f}" for figure in figures))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
