"""Which learning rate does `learning_rate=auto` choose for each method, base and task, and which one was the best?

    python -m benchmarks.learning_rate --out FILE.json [--bases embedded smollm2] [--methods lora tail ...]

Computes the rate as `astra-train` does, without training: start, one batch, gradients. Beside it stands the best rate
of the searches of `benchmarks.methods`, where one has been made; the best rate is the one of the lowest loss, which is
seldom the one that forgets least.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.methods import bases, real, starts, tasks
from benchmarks.methods.suite import SUITES
from benchmarks.methods.sweep import Sweep
from benchmarks.methods.trial import Results, config_of
from trainer.adapter import attach, target_layers
from trainer.base import load_base, load_tokenizer
from trainer.data import language_examples
from trainer.learning_rate import automatic_rate, first_step, losses_of
from trainer.start.initialise import calibration_batches, initialise

METHODS = ("lora", "pissa", "tail", "principal")
TASKS = {"embedded": ("intent", "cpp"), "smollm2": ("intent",)}
ROWS = 64
RESULTS = Path(__file__).parent / "results" / "methods"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--bases", nargs="+", choices=TASKS, default=list(TASKS), help="(default: both)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"(default: {' '.join(METHODS)})")
    args = parser.parse_args()
    PartialState(cpu=not torch.cuda.is_available())
    env = report.environment(0)
    table = Table("base", "task", "method", "sum of gradients", "auto", "best of the search")
    cases = []
    for base in args.bases:
        for task in TASKS[base]:
            for method in args.methods:
                case = measure(base, task, method)
                cases.append(case)
                best = "" if case["best"] is None else f"{case['best']:.2g}"
                table.add_row(base, task, method, f"{case['gradients']:.0f}", f"{case['auto']:.2g}", best)
    Console().print(table)
    report.write(args.out, {f"{c['base']}.{c['task']}.{c['method']}": c["auto"] for c in cases}, cases, env)
    return 0


def measure(base: str, task: str, method: str) -> dict[str, object]:
    """Return the automatic rate of a method at rank 8, and the best one of its search or None."""
    sweep = real.sweep(task, method) if base == real.BASE else SUITES["small"].sweep(task, method)
    config = config_of(sweep.at(0), starts.settings_of(method)).model_copy(update={"calibration_rows": ROWS})
    folder = bases.folder(base)
    tokenizer = load_tokenizer(folder, config)
    examples = language_examples(tasks.rows(task, "train", ROWS), tokenizer, config.max_length, task)
    torch.manual_seed(0)
    model = load_base(folder, config)
    layers = target_layers(model, config)
    calibration = calibration_batches(examples, tokenizer, config)
    start = initialise(model, layers, calibration, config, "", Progress(disable=True))
    adapted = attach(model, start.starts, config)
    rate = automatic_rate(adapted, losses_of(adapted, examples[: config.batch_size], tokenizer, config), config)
    found = {"base": base, "task": task, "method": method, "rank": config.rank, "auto": rate}
    return {**found, "gradients": first_step(config) / rate, "best": _best(base, sweep)}


def _best(base: str, sweep: Sweep) -> float | None:
    file = RESULTS / ("real" if base == real.BASE else "small") / "runs.jsonl"
    best = sweep.best(Results(file))
    return best.learning_rate if best else None


if __name__ == "__main__":
    sys.exit(main())
