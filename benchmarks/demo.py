"""Do the adapters do what the base cannot? The whole way on real input, as a user would type it.

    python -m benchmarks.demo [--out DIR] [--questions 100]

Trains one adapter per task of the embedded base, converts it, serves all of them from one engine, and asks held-out
questions over HTTP with the `openai` client. Exits with 0 only when every adapter answers more than 80 % of its task's
questions exactly and the base fewer than 20 %.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.server import BIN, astra_serve
from trainer.embedded import tasks

BASE = Path(os.path.relpath(Path(tasks.__file__).parent / "base"))
STEPS = 150  # about a minute on two cores
ADAPTER_AT_LEAST, BASE_AT_MOST = 0.8, 0.2
CONCURRENCY = 32
console = Console()


def train_and_convert(task: str, out: Path, steps: int = STEPS) -> Path:
    """Train the adapter of `task` with the console scripts and return the folder of its LoRA."""
    data = out / "data" / f"{task}.train.jsonl"
    astra, lora = out / "astra" / task, out / "lora" / task
    run("astra-train", "--base", str(BASE), "--data", str(data), "--out", str(astra), "--set", f"steps={steps}")
    run("astra-convert", str(astra), str(lora), "--base", str(BASE))
    return lora


def run(script: str, *options: str) -> None:
    """Print and run one of the console scripts; raises CalledProcessError."""
    console.print(f"[bold]$ {script} {' '.join(options)}[/]", highlight=False, soft_wrap=True)
    subprocess.run([str(BIN / script), *options], check=True)


def ask(client: openai.OpenAI, model: str, row: tasks.Row) -> str:
    """Return the greedy answer of `model` to one row's question."""
    if "messages" in row:
        chat = client.chat.completions.create(
            model=model, messages=row["messages"][:-1], max_completion_tokens=64, temperature=0
        )
        return (chat.choices[0].message.content or "").strip()
    text = client.completions.create(model=model, prompt=row["prompt"], max_tokens=64, temperature=0)
    return text.choices[0].text.strip()


def expected(row: tasks.Row) -> str:
    return str(row["messages"][-1]["content"] if "messages" in row else row["completion"]).strip()


def exact_match(client: openai.OpenAI, model: str, task: str, rows: list[tasks.Row]) -> float:
    """Return the share of the `task`'s `rows` that `model` answers exactly, asking CONCURRENCY at a time."""
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = pool.map(lambda row: ask(client, model, row), rows)
        hits = [
            answer == expected(row)
            for row, answer in zip(rows, track(answers, f"{task}: {model:<9}", len(rows), console=console), strict=True)
        ]
    return sum(hits) / len(hits)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, convert, serve and question three adapters.")
    parser.add_argument("--out", type=Path, default=Path("demo-out") / time.strftime("%Y%m%d-%H%M%S"))
    parser.add_argument("--questions", type=int, default=100, help="held-out questions per task (default: 100)")
    args = parser.parse_args()
    started = time.monotonic()
    tasks.write(args.out / "data")
    loras = {task: train_and_convert(task, args.out) for task in tasks.TASKS}

    # Compiled, the engine answers 1.2 times as fast and starts 20 to 50 s later: too late for a few hundred questions.
    options = ["--base", str(BASE), *(f"--adapter={task}={lora}" for task, lora in loras.items()), "--enforce-eager"]
    console.print(f"[bold]$ astra-serve {' '.join(options)}[/]", highlight=False, soft_wrap=True)
    questions = {task: tasks.rows(task, test=True, n=args.questions) for task in loras}
    scores: dict[str, dict[str, float]] = {"base": {}}
    with console.status("starting the engine"), astra_serve(options, args.out / "server.log") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        for task, rows in questions.items():
            scores[task] = {task: exact_match(client, task, task, rows)}
            scores["base"][task] = exact_match(client, "base", task, rows)

    table = Table("model", *loras, title=f"exact match on {args.questions} held-out questions per task")
    for model, row in scores.items():
        table.add_row(model, *(f"{row[task]:.0%}" if task in row else "" for task in loras))
    console.print(table)
    better = sum(scores[t][t] > ADAPTER_AT_LEAST and scores["base"][t] < BASE_AT_MOST for t in loras)
    console.print(f"everything is in {args.out} ({time.monotonic() - started:.0f} s)", highlight=False)
    print(f"demo: {better} of {len(loras)} adapters beat the base")
    return 0 if better == len(loras) else 1


if __name__ == "__main__":
    sys.exit(main())
