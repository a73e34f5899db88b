"""Train and convert adapters for the tasks of the embedded base, and ask held-out questions."""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from rich.console import Console
from rich.progress import track

from tests.support.server import BIN
from trainer.embedded import tasks

BASE = Path(os.path.relpath(Path(tasks.__file__).parent / "base"))
# About a minute on two cores. The automatic rate, which forgets less, is too low for this base in so few steps.
SETTINGS = ("steps=150", "learning_rate=4e-3")
ADAPTER_AT_LEAST, BASE_AT_MOST = 0.8, 0.2  # shares of questions that are answered exactly
CONCURRENCY = 32
console = Console()


def train_and_convert(task: str, out: Path, settings: Sequence[str] = SETTINGS, base: Path = BASE) -> Path:
    """Train the adapter of `task` for `base` with the console scripts and return the folder of its LoRA.

    The rows of the tasks must be in `out`/data. Raises CalledProcessError.
    """
    data = out / "data" / f"{task}.train.jsonl"
    astra, lora = out / "astra" / task, out / "lora" / task
    chosen = [part for setting in settings for part in ("--set", setting)]
    run("astra-train", "--base", str(base), "--data", str(data), "--out", str(astra), *chosen)
    run("astra-convert", str(astra), str(lora), "--base", str(base))
    return lora


def run(script: str, *options: str) -> None:
    """Print and run one of the console scripts. Raises CalledProcessError."""
    console.print(f"[bold]$ {script} {' '.join(options)}[/]", highlight=False, soft_wrap=True)
    subprocess.run([str(BIN / script), *options], check=True)


def ask(client: openai.OpenAI, model: str, row: tasks.Row) -> str:
    """Return the greedy answer of `model` to the question of `row`."""
    if "messages" in row:
        chat = client.chat.completions.create(
            model=model, messages=row["messages"][:-1], max_completion_tokens=64, temperature=0
        )
        return (chat.choices[0].message.content or "").strip()
    text = client.completions.create(model=model, prompt=row["prompt"], max_tokens=64, temperature=0)
    return text.choices[0].text.strip()


def expected(row: tasks.Row) -> str:
    """Return the right answer to the question of `row`."""
    return str(row["messages"][-1]["content"] if "messages" in row else row["completion"]).strip()


def exact_match(client: openai.OpenAI, model: str, task: str, rows: list[tasks.Row]) -> float:
    """Return the share of the `task`'s `rows` that `model` answers exactly; CONCURRENCY requests run at a time."""
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = pool.map(lambda row: ask(client, model, row), rows)
        hits = [
            answer == expected(row)
            for row, answer in zip(rows, track(answers, f"{task}: {model:<9}", len(rows), console=console), strict=True)
        ]
    return sum(hits) / len(hits)
