"""Which rank does `astra-convert --rank auto` choose, measured on general prompts and on rows of the adapter's task?

    python -m benchmarks.rank_auto --trained DIR --out FILE.json

DIR is a run of `python -m benchmarks.demo` or of the same with --real. Each of its adapters, which were trained with
rank 16 and are rank 32 exactly, is converted with `--rank auto`: once with the prompts that `astra-convert` uses by
itself, and once with 16 held-out questions and answers of its task.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks import report
from converter.adapter_dir import load_astra
from converter.convert import Options, convert
from converter.stored import AUTO
from trainer.embedded import tasks

PROMPTS = 16
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, metavar="DIR", help="a run of the demo")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    env = report.environment(0)
    cases = [case for task in tasks.TASKS for case in measure(task, args.trained / "astra" / task)]
    summary = {f"{case['task']}.{case['prompts']}.rank": case["rank"] for case in cases}
    report.write(args.out, summary, cases, env)
    table = Table("adapter", "prompts", "rank", "energy dropped", "KL, nats per token", "effect of the adapter")
    for case in cases:
        kl, effect = case["verification"]["mean_kl"], case["verification"]["effect"]
        energy = f"{case['dropped_energy']:.0%}"
        table.add_row(case["task"], case["prompts"], str(case["rank"]), energy, f"{kl:.2g}", f"{effect:.2g}")
    console.print(table)
    return 0


def measure(task: str, adapter: Path) -> list[dict[str, Any]]:
    """Convert the adapter of `task` twice, and return what was chosen and measured."""
    base = load_astra(adapter).provenance["base"]["id"]
    found = []
    for kind, prompts in (("general", []), ("task", questions(task, base))):
        with tempfile.TemporaryDirectory() as folder:
            options = Options(base=base, rank=AUTO, prompts=prompts)
            record = convert(adapter, Path(folder) / "lora", options, Progress(disable=True)).provenance
        keys = ("rank", "tried", "verification")
        chosen = {key: record[key] for key in keys}
        dropped = record["errors"].get("dropped_energy", 0.0)
        found.append({"task": task, "prompts": kind, "dropped_energy": dropped, **chosen})
    return found


def questions(task: str, base: str) -> list[str]:
    """Return held-out questions with their answers, as the chat template of `base` renders them where it has one."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = tasks.rows(task, test=True, n=PROMPTS)
    if tokenizer.chat_template is None or "smollm" not in base.lower():  # the embedded base learns plain text
        return [row["prompt"] + row["completion"] for row in rows]
    return [tokenizer.apply_chat_template(tasks.as_chat(row)["messages"], tokenize=False) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
