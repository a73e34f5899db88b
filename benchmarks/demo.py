"""Do the adapters answer questions that the base cannot answer? The whole path on real input, with the console scripts.

    python -m benchmarks.demo [--real] [--out DIR] [--questions 100] [--trained DIR]

Trains one adapter per task of the embedded base, converts it, serves all of them from one engine, and asks held-out
questions over HTTP with the `openai` client. Exits with 0 only if every adapter answers more than 80 % of its task's
questions exactly and the base fewer than 20 %. With --real, the base is SmolLM2-135M-Instruct, which is downloaded once
(93 MB), and the rows are chats. The table is also written to DIR/demo.json, and drawn in DIR/demo.png.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import openai
from rich.table import Table

from benchmarks import report
from benchmarks.methods import bases
from converter.adapter_dir import AdapterError
from tests.support import demo
from tests.support.demo import ADAPTER_AT_LEAST, BASE_AT_MOST, console, exact_match, train_and_convert
from tests.support.server import astra_serve
from trainer.embedded import tasks

REAL = ["steps=90", "batch_size=8", "spectra=false", "calibration_rows=64", "forgetting_rows=16"]  # about six minutes


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: demo-out/DATE-TIME)")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions per task (default: 100)")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct instead of the embedded base")
    parser.add_argument("--trained", type=Path, metavar="DIR", help="ask the adapters of the earlier run in DIR")
    args = parser.parse_args()
    if args.trained and not (args.trained / "lora").is_dir():
        parser.error(f"--trained: {args.trained} has no folder lora: give the folder of a finished run")
    # Not in the same folder: commands of the README use the newest run in demo-out.
    out = args.out or Path("demo-real-out" if args.real else "demo-out") / time.strftime("%Y%m%d-%H%M%S")
    try:
        base, settings = (bases.folder("smollm2"), REAL) if args.real else (demo.BASE, demo.SETTINGS)
    except AdapterError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    env = report.environment(0)
    tasks.write(out / "data", chat=args.real)
    if args.trained:
        loras = {task: args.trained / "lora" / task for task in tasks.TASKS}
    else:
        loras = {task: train_and_convert(task, out, settings, base) for task in tasks.TASKS}

    # A compiled engine generates 1.2 times as fast but starts 20 to 50 s later: too late for a few hundred questions.
    options = ["--base", str(base), *(f"--adapter={task}={lora}" for task, lora in loras.items()), "--enforce-eager"]
    console.print(f"[bold]$ astra-serve {' '.join(options)}[/]", highlight=False, soft_wrap=True)
    rows_of = {task: tasks.rows(task, test=True, n=args.questions) for task in loras}
    questions = {task: [tasks.as_chat(row) if args.real else row for row in rows] for task, rows in rows_of.items()}
    scores: dict[str, dict[str, float]] = {base.name: {}}
    with console.status("starting the engine"), astra_serve(options, out / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        for task, rows in questions.items():
            scores[task] = {task: exact_match(client, task, task, rows)}
            scores[base.name][task] = exact_match(client, base.name, task, rows)

    table = Table("model", *loras, title=f"exact match on {args.questions} held-out questions per task")
    for model, row in scores.items():
        table.add_row(model, *(f"{row[task]:.0%}" if task in row else "" for task in loras))
    console.print(table)
    better = sum(scores[t][t] > ADAPTER_AT_LEAST and scores[base.name][t] < BASE_AT_MOST for t in loras)
    seconds = round(time.monotonic() - started)
    cases = [{"task": t, "base": scores[base.name][t], "adapter": scores[t][t]} for t in loras]
    summary = {
        "base": base.name,
        "settings": settings,
        "questions": args.questions,
        "trained_before": bool(args.trained),
    }
    report.write(out / "demo.json", {**summary, "seconds": seconds, "better": better}, cases, env)
    plot(base.name, cases, out / "demo.png")
    console.print(f"all files are in {out} ({seconds} s)", highlight=False)
    print(f"demo: {better} of {len(loras)} adapters beat the base")
    return 0 if better == len(loras) else 1


def plot(base: str, cases: list[dict[str, Any]], out: Path) -> None:
    """Draw the shares of exact answers of base and adapters."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for i, (who, label) in enumerate((("base", base), ("adapter", "with the task's adapter"))):
        bars = axis.bar([x + 0.4 * i for x in range(len(cases))], [100 * c[who] for c in cases], 0.38, label=label)
        axis.bar_label(bars, fmt="%.0f %%")
    axis.set_xticks([x + 0.2 for x in range(len(cases))], [case["task"] for case in cases])
    axis.set_ylabel("exact answers, %")
    axis.set_ylim(0, 112)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
