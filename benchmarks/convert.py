"""How large is the error of a converted adapter, by four routes, and how much time and memory does conversion need?

    python -m benchmarks.convert --out FILE.json [--quick] [--only adapters|size]
    python -m benchmarks.convert --redraw FILE.json

Four routes to serve an adapter in bfloat16, compared with the exact change s (B A - B0 A0) in float64:

    ours           lora_B = s [dB | B0], lora_A = [A ; dA]
    concat         lora_B = s [B | -B0], lora_A = [A ; A0]: the textbook form, also PEFT's
    residual       W - s B0 A0 stored as a model of its own, with A and B as its adapter: the reference code's route
    compress_half  ours, compressed to half its rank

Adapters: two that astra-train trained on the embedded base, in a short and a long run, also compared by the KL of the
served from the trained model on held-out prompts; and generated layers whose factors changed by 30 to 0.3 % of their
initial norm. Errors are norms relative to the norm of the change, over all layers together.

Size: astra-convert converts an adapter of random numbers with Llama-3-8B's shapes at rank 128, in a process of its own:
seconds and peak memory (the kernel's counter). The base is not available there, so only the factors are checked.

The headline figures are those of the long run. The plot shows the errors by rank for both runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks import report
from benchmarks.initialisers import MODELS
from converter.adapter_dir import AstraLayer, base_weights, load_astra, new_folder
from converter.adapter_dir.tensors import write_tensors
from converter.check_model import logits, mean_kl, tokenise
from converter.compress import truncate
from converter.delta import delta_weight, lora_factors
from trainer.config import TrainConfig
from trainer.embedded import tasks
from trainer.train import train

BASE = Path(tasks.__file__).parent / "base"
SEED, RANK, TASK, PROMPTS = 0, 16, "sql", 32
RUNS = {"short run": 15, "long run": 150}  # steps
MOVES = (0.3, 0.03, 0.01, 0.003)  # shares of the initial norm, for generated layers (1024 x 1024, rank 16)
LARGE, LARGE_RANK = MODELS["llama-3-8b"], 128
ROUTES = ("ours", "concat", "residual", "compress_half")
TARGETS = {"llama8b_r128_seconds": 60, "llama8b_r128_peak_gib": 2}
# Run astra-convert, then print its peak memory.
CONVERT = (
    "import sys; from benchmarks import peak_memory; from converter.cli import main; "
    "status = main(sys.argv[1:]); print(peak_memory.peak_bytes()); sys.exit(status)"
)
console = Console()

Factors = tuple[torch.Tensor, torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write; the plot is written beside it")
    parser.add_argument("--only", choices=("adapters", "size"), help="measure only errors, or only time and memory")
    parser.add_argument("--quick", action="store_true", help="smoke run: 3 steps, four ranks, two blocks")
    parser.add_argument("--redraw", type=Path, metavar="FILE.json", help="only draw the plot of an existing result")
    args = parser.parse_args()
    if args.redraw:
        plot(json.loads(args.redraw.read_text(encoding="utf-8")), args.redraw.with_suffix(".png"))
        return 0
    if not args.out:
        parser.error("--out FILE.json is needed")
    cases, env = [], report.environment(SEED)
    if args.only != "size":
        cases += [generated(move) for move in track(MOVES, "generated layers", console=console)]
        with tempfile.TemporaryDirectory() as folder:
            for name, steps in RUNS.items():
                cases.append(trained(name, 3 if args.quick else steps, Path(folder), quick=args.quick))
    if args.only != "adapters":
        cases.append(size(blocks=2 if args.quick else LARGE.layers, repeats=1 if args.quick else 3))
    report.write(args.out, summarise(cases), cases, env)
    result = json.loads(args.out.read_text(encoding="utf-8"))
    show(result)
    if args.only != "size":
        plot(result, args.out.with_suffix(".png"))
    return 0


def routes(layer: AstraLayer, scaling: float, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return by route the change (d_out, d_in), float64, that is effectively added to the bfloat16 `weight`."""
    found = {name: _product(factors) for name, factors in stored(layer, scaling).items()}
    initial = scaling * (layer.b0 @ layer.a0)
    residual = (weight.float() - initial).bfloat16()
    product = scaling * (layer.b.bfloat16().double() @ layer.a.bfloat16().double())
    return {**found, "residual": residual.double() + product - weight.double()}


def stored(layer: AstraLayer, scaling: float) -> dict[str, Factors]:
    """Return the bfloat16 factors of the routes that do not change the base."""
    ours = lora_factors(layer, scaling)
    concat = torch.cat([layer.a, layer.a0]), scaling * torch.cat([layer.b, -layer.b0], dim=1)
    half = truncate(*ours, len(ours[0]) // 2)
    return {
        name: (a.bfloat16(), b.bfloat16())
        for name, (a, b) in (("ours", ours), ("concat", concat), ("compress_half", half))
    }


def errors(layers: Mapping[str, AstraLayer], scaling: float, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the relative error of each route over all layers together."""
    squares = dict.fromkeys(ROUTES, 0.0)
    total = 0.0
    for name, layer in layers.items():
        exact = delta_weight(layer, scaling)
        total += float(exact.square().sum())
        for route, change in routes(layer, scaling, weights[name]).items():
            squares[route] += float((change - exact).square().sum())
    return {f"{route}_rel_error": (square / total) ** 0.5 for route, square in squares.items()}


def generated(move: float) -> dict[str, Any]:
    """Return the errors of the routes for a random layer whose factors changed by `move` of their initial norm."""
    generator = torch.Generator().manual_seed(SEED)
    d, r = 1024, 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = (normal(d, d) / d**0.5).bfloat16()
    b0 = torch.linalg.qr(normal(d, r)).Q
    a0 = b0.T @ weight.float()
    a, b = (t + move * t.norm() * normal(*t.shape) / t.numel() ** 0.5 for t in (a0, b0))
    layer = AstraLayer(a, b, a0, b0)
    return {"adapter": f"generated, moved by {move:.1%}", **errors({"layer": layer}, 1.0, {"layer": weight})}


def trained(name: str, steps: int, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Train an adapter, and return the errors of the routes in weights and in the model, and the errors by rank."""
    out, rows = folder / name.replace(" ", "-"), folder / f"{name}.jsonl"
    examples = tasks.rows(TASK, test=False, n=3000, seed=SEED)
    rows.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    config = TrainConfig(rank=RANK, steps=steps, seed=SEED, forgetting_rows=0, spectra=False)
    train(str(BASE), str(rows), out, config, Progress(console=console, transient=True))
    adapter = load_astra(out)
    layers, scaling = dict(adapter.layers), adapter.scaling
    weights = {module: base_weights(BASE)[f"{module}.weight"] for module in layers}
    # A0 of a layer with d_out > d_in is zero: no relative change can be given there.
    nonzero = [layer for layer in layers.values() if layer.a0.norm() > 1e-3 * layer.a.norm()]
    moved = [float((layer.a - layer.a0).norm() / layer.a0.norm()) for layer in nonzero]
    questions = tasks.rows(TASK, test=True, n=PROMPTS, seed=SEED)
    model, ids, mask = _model_and_prompts([row["prompt"] for row in questions])
    exact = {module: lora_factors(layer, scaling) for module, layer in layers.items()}
    truth = _log_probabilities(model, ids, mask, exact)
    found = {"adapter": name, "steps": steps, "median_move_of_A": median(moved), **errors(layers, scaling, weights)}
    by_route = {module: stored(layer, scaling) for module, layer in layers.items()}
    for route in ("ours", "concat", "compress_half"):
        served = {module: by_route[module][route] for module in layers}
        found[f"{route}_kl"] = mean_kl(truth, _log_probabilities(model, ids, mask, served))
    found["effect"] = mean_kl(truth, _log_probabilities(model, ids, mask, {}))
    ranks = (1, 4, 8, 2 * RANK) if quick else range(1, 2 * RANK + 1)
    found["by_rank"] = [
        _at_rank(rank, exact, truth, model, ids, mask) for rank in track(ranks, f"{name}: ranks", console=console)
    ]
    _subtract_initial(model, layers, scaling)
    pairs = {module: (layer.a.bfloat16(), (scaling * layer.b).bfloat16()) for module, layer in layers.items()}
    found["residual_kl"] = mean_kl(truth, _log_probabilities(model, ids, mask, pairs))
    return found


def _at_rank(
    rank: int,
    exact: Mapping[str, Factors],
    truth: torch.Tensor,
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> dict[str, float]:
    """Return the relative error and the KL of the adapter with factors `exact`, compressed to `rank`."""
    kept, dropped, total = {}, 0.0, 0.0
    for module, factors in exact.items():
        smaller = truncate(*factors, rank) if rank < len(factors[0]) else factors
        kept[module] = smaller[0].bfloat16(), smaller[1].bfloat16()
        change = _product(factors)
        dropped += float((_product(kept[module]) - change).square().sum())
        total += float(change.square().sum())
    kl = mean_kl(truth, _log_probabilities(model, ids, mask, kept))
    return {"rank": rank, "rel_error": (dropped / total) ** 0.5, "kl": kl}


def size(blocks: int, repeats: int) -> dict[str, Any]:
    """Convert a generated adapter of Llama-3-8B's shapes, and return bytes, seconds and peak memory (GiB)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = write_large(folder / "astra", blocks)
        runs = []
        for number in track(range(repeats), f"{blocks} blocks of Llama-3-8B, rank {LARGE_RANK}", console=console):
            out = folder / f"lora{number}"
            command = [sys.executable, "-c", CONVERT, str(folder / "astra"), str(out)]
            began = time.perf_counter()
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            seconds = time.perf_counter() - began
            runs.append({"seconds": seconds, "peak_gib": int(printed.splitlines()[-1]) / 2**30})
            written = sum(file.stat().st_size for file in out.iterdir())
    return {
        "adapter": f"Llama-3-8B, rank {LARGE_RANK}, {blocks} blocks",
        "read_gib": source / 2**30,
        "written_gib": written / 2**30,
        "repetitions": runs,
        **{key: median(run[key] for run in runs) for key in runs[0]},
    }


def write_large(out: Path, blocks: int) -> int:
    """Write an Astra adapter of random numbers with the layer shapes of Llama-3-8B; return the bytes of its weights."""
    generator = torch.Generator().manual_seed(SEED)
    modules = {
        f"model.layers.{i}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}": shape
        for i in range(blocks)
        for name, shape in LARGE.linear().items()
    }

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for module, (d_out, d_in) in modules.items():
            a0, b0 = (
                torch.randn(LARGE_RANK, d_in, generator=generator),
                torch.randn(d_out, LARGE_RANK, generator=generator),
            )
            for part, initial in (("A", a0), ("B", b0)):
                yield f"{module}.{part}", initial + 0.1 * torch.randn(initial.shape, generator=generator)
                yield f"{module}.{part}0", initial

    names = [f"{module}.{part}" for module in modules for part in ("A", "B", "A0", "B0")]
    with new_folder(out) as folder:
        write_tensors(folder / "astra_weights.safetensors", names, tensors(), {"format": "pt"})
        base = {"id": "generated/llama-3-8b-shapes", "digest": "sha256:none", "dtype": "bfloat16"}
        config = {"peft_type": "LORA", "r": LARGE_RANK, "lora_alpha": LARGE_RANK, "target_modules": sorted(modules)}
        for name, content in (
            ("astra.json", {"format": "astra-adapter/1", "base": base}),
            ("adapter_config.json", config),
        ):
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return (out / "astra_weights.safetensors").stat().st_size


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the headline figures: errors and KL of the long run, time and memory at Llama-3-8B's shapes."""
    found: dict[str, Any] = {}
    for case in cases:
        if case["adapter"] == "long run":
            found |= {key: case[key] for key in case if key.endswith(("_rel_error", "_kl")) or key == "effect"}
        if "peak_gib" in case:
            found |= {"llama8b_r128_seconds": case["seconds"], "llama8b_r128_peak_gib": case["peak_gib"]}
    return {**{key: float(f"{value:.3g}") for key, value in found.items()}, "targets": TARGETS}


def show(result: Mapping[str, Any]) -> None:
    title = "relative error of the change in bfloat16, and KL of the served from the trained model (nats per token)"
    table = Table("adapter", title=title)
    for route in ROUTES:
        table.add_column(route.replace("_", " "), justify="right")
    for case in result["cases"]:
        if "ours_rel_error" in case:
            table.add_row(case["adapter"], *(f"{case[f'{route}_rel_error']:.2%}" for route in ROUTES))
        if "ours_kl" in case:
            label = f"  KL (effect of the adapter: {case['effect']:.2g})"
            table.add_row(label, *(f"{case[f'{route}_kl']:.2g}" for route in ROUTES))
    Console(width=max(console.width, 100)).print(table)
    for case in result["cases"]:
        if "peak_gib" in case:
            console.print(
                f"{case['adapter']}: {case['seconds']:.1f} s, {case['peak_gib']:.2f} GiB peak memory, "
                f"{case['read_gib']:.2f} GiB read, {case['written_gib']:.2f} GiB written",
                highlight=False,
            )


def plot(result: Mapping[str, Any], out: Path) -> None:
    """Draw the error of the change and the KL by rank."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for case in (case for case in result["cases"] if "by_rank" in case):
        ranks = [point["rank"] for point in case["by_rank"]]
        label = f"{case['adapter']}, {case['steps']} steps"
        for axis, key in zip(axes, ("rel_error", "kl"), strict=True):
            axis.plot(ranks, [point[key] for point in case["by_rank"]], "o-", markersize=3, label=label)
    for axis, label in zip(axes, ("relative error of delta W", "KL, nats per token"), strict=True):
        axis.set(xlabel="rank (exact: 32, trained: 16)", ylabel=label, yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set_title("error in the weights")
    axes[1].set_title("error in the model")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _model_and_prompts(prompts: list[str]) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16).eval()
    _, ids, mask = tokenise(AutoTokenizer.from_pretrained(BASE), prompts)
    return model, ids, mask


def _log_probabilities(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, layers: Mapping[str, Factors]
) -> torch.Tensor:
    return logits(model, ids, mask, layers, lambda *_: 1.0)[mask].double().log_softmax(-1)


@torch.no_grad()
def _subtract_initial(model: PreTrainedModel, layers: Mapping[str, AstraLayer], scaling: float) -> None:
    for module, layer in layers.items():
        weight = model.get_submodule(module).weight
        weight.copy_((weight.float() - scaling * layer.b0 @ layer.a0).bfloat16())


def _product(factors: Factors) -> torch.Tensor:
    return factors[1].double() @ factors[0].double()


if __name__ == "__main__":
    sys.exit(main())
