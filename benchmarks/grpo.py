"""Does reinforcement learning with this server as the rollout server work, from the first step to a served adapter?

    python -m benchmarks.grpo --out FILE.json [--steps 120] [--quick]

An adapter of the embedded base first sees few rows of `sql`, so that some of its answers are right. TRL's GRPOTrainer
then trains it, without rows: the reward of an answer is 1 if it is one statement that SQLite can prepare on the table
of the question, that is, if it parses and names only columns of this table. Each step publishes the policy through the
policy port, which takes it as TRL's AsyncGRPOTrainer publishes it, and samples the answers from it. That trainer itself
needs the FlashAttention kernels of a GPU. At the end the policy is converted, proved, published through the admin
port, and asked held-out questions.

    reward_first, reward_last   mean reward of the first and the last tenth of the steps
    valid_before, valid_after   share of greedy answers to held-out questions with reward 1, of the served adapters
    exact_before, exact_after   share that equals the expected answer
    wrong_version               answers that name another version than the one published for the step
"""

import argparse
import re
import secrets
import sqlite3
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
from datasets import Dataset
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback

from astra_serve.client import Client
from benchmarks import report
from tests.support import demo
from tests.support.server import astra_serve, free_port
from trainer import load_adapter, save_lora
from trainer.embedded import tasks
from trainer.sft import trl

warnings.filterwarnings("ignore", "TRL currently supports vLLM")  # it does not use vLLM here
PROMPTS, SAMPLES, MAX_TOKENS = 8, 4, 48
SFT = ("steps=40", "batch_size=8", "learning_rate=2e-3", "forgetting_rows=0", "spectra=false", "rank=8")
TOKEN = secrets.token_hex(16)
TABLE = re.compile(r"Table (\w+) \(([^)]*)\)")
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--steps", type=int, default=120, help="default: 120")
    parser.add_argument("--quick", action="store_true", help="smoke run: 3 steps, 16 questions")
    args = parser.parse_args()
    steps, n_questions = (3, 16) if args.quick else (args.steps, 100)
    env = report.environment(0)
    with tempfile.TemporaryDirectory() as temporary:
        summary, cases = run(Path(temporary), steps, n_questions)
    report.write(args.out, summary, cases, env)
    table = Table("", "before", "after", title="GRPO on sql")
    table.add_row("reward of samples", *(f"{summary[f'reward_{when}']:.2f}" for when in ("first", "last")))
    for key in ("valid", "exact"):
        table.add_row(f"{key} greedy answers", *(f"{summary[f'{key}_{when}']:.0%}" for when in ("before", "after")))
    console.print(table)
    return 0


def run(folder: Path, steps: int, n_questions: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train for `steps` steps beside a server; return the summary and one case per step."""
    tasks.write(folder / "data")
    before = demo.train_and_convert("sql", folder, SFT)
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    model = load_adapter(AutoModelForCausalLM.from_pretrained(demo.BASE), folder / "astra" / "sql")
    questions = tasks.rows("sql", test=True, n=n_questions)
    policies, admin_port, policy_port = folder / "policies", free_port(), free_port()
    options = ["--base", str(demo.BASE), "--adapters", str(folder / "adapters.yaml"), "--enforce-eager"]
    options += ["--admin-port", str(admin_port), "--policy-port", str(policy_port), "--adapter-root", str(folder)]
    console.print("starting the engine")
    with (
        astra_serve(options, folder / "server.log", environment={"ASTRA_ADMIN_TOKEN": TOKEN}) as server,
        Client(f"http://127.0.0.1:{admin_port}", TOKEN) as admin,
    ):
        admin.publish("before", before)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
        began = time.monotonic()
        with Progress(console=console) as progress:
            advance = partial(progress.advance, progress.add_task("training", total=steps))
            rollouts = Rollouts(f"http://127.0.0.1:{policy_port}", policies, tokenizer, advance)
            trainer = make_trainer(model, tokenizer, rollouts, folder / "runs", steps)
            trainer.train()
        seconds = time.monotonic() - began
        save_lora(model, folder / "lora" / "after")
        admin.publish("after", folder / "lora" / "after")
        scores = {when: scored(client, when, questions) for when in ("before", "after")}
    cases = [{**step, "reward": reward} for step, reward in zip(rollouts.steps, rewards(trainer), strict=True)]
    tenth = max(1, len(cases) // 10)
    return {
        "reward_first": statistics.fmean(case["reward"] for case in cases[:tenth]),
        "reward_last": statistics.fmean(case["reward"] for case in cases[-tenth:]),
        **{f"{key}_{when}": score for when, found in scores.items() for key, score in found.items()},
        "publish_p50_s": statistics.median(case["publish_s"] for case in cases),
        "wrong_version": sum(case["wrong_version"] for case in cases),
        "steps": steps,
        "seconds": round(seconds),
    }, cases


class Rollouts:
    """TRL's `rollout_func`: publishes the policy of each step, and samples answers from it."""

    def __init__(self, url: str, folder: Path, tokenizer: PreTrainedTokenizerBase, on_step: Callable[[], None]) -> None:
        self.steps: list[dict[str, Any]] = []
        self._on_step = on_step
        self._folder, self._tokenizer = folder, tokenizer
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """Return the ids of prompts and answers, and the log probability of each token of an answer."""
        number = len(self.steps) + 1
        name, folder = f"policy-v{number}", self._folder / f"v{number}"
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, selected_adapters=["default"])
        began = time.perf_counter()
        loaded = self._client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        loaded.raise_for_status()
        seconds, version = time.perf_counter() - began, loaded.json()["version"]
        if number > 1:
            self._client.post("/v1/unload_lora_adapter", json={"lora_name": f"policy-v{number - 1}"})
        ids = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        with ThreadPoolExecutor(PROMPTS * SAMPLES) as pool:
            answers = list(pool.map(lambda prompt: self._sample(name, prompt), ids))
        wrong = sum(answer["model"] != version for answer in answers)
        self.steps.append({"publish_s": round(seconds, 4), "wrong_version": wrong})
        self._on_step()
        choices = [answer["choices"][0] for answer in answers]
        return {
            "prompt_ids": ids,
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }

    def _sample(self, name: str, prompt: list[int]) -> Any:
        body = {"model": name, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 1.0}
        answer = self._client.post("/v1/completions", json={**body, "logprobs": 0, "return_token_ids": True})
        return answer.raise_for_status().json()


def make_trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts, folder: Path, steps: int
) -> "trl.GRPOTrainer":
    """Return the trainer of the policy; its optimizer and loss are TRL's defaults, but for the learning rate."""
    arguments = trl.GRPOConfig(
        str(folder),
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=MAX_TOKENS,
        beta=0.0,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"prompt": row["prompt"]} for row in tasks.rows("sql", test=False, n=1000)]
    data = Dataset.from_list(rows)
    trainer = trl.GRPOTrainer(model, valid, arguments, data, processing_class=tokenizer, rollout_func=rollouts)
    trainer.remove_callback(PrinterCallback)
    return trainer


def valid(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return the reward of each answer: 1.0 if SQLite can prepare it on the table of the question, else 0.0."""
    return [float(is_valid(prompt, answer)) for prompt, answer in zip(prompts, completions, strict=True)]


def is_valid(prompt: str, answer: str) -> bool:
    """Return whether an answer is one SELECT that parses and names only columns of the question's table."""
    found = TABLE.search(prompt)
    assert found is not None
    table, columns = found[1], [column.strip() for column in found[2].split(",")]
    names = ", ".join(f'"{column}"' for column in columns)
    database = sqlite3.connect(":memory:")
    try:
        database.execute(f'CREATE TABLE "{table}" ({names})')
        database.execute(f"EXPLAIN {answer.strip()}")
    except (sqlite3.Error, sqlite3.Warning, ValueError):  # ValueError: a null character
        return False
    finally:
        database.close()
    return answer.strip().upper().startswith("SELECT")


def scored(client: openai.OpenAI, model: str, rows: list[tasks.Row]) -> dict[str, float]:
    """Return the shares of valid and of exact greedy answers of a served adapter."""
    with ThreadPoolExecutor(demo.CONCURRENCY) as pool:
        answers = list(pool.map(lambda row: demo.ask(client, model, row), rows))
    pairs = list(zip(rows, answers, strict=True))
    return {
        "valid": statistics.fmean(is_valid(row["prompt"], answer) for row, answer in pairs),
        "exact": statistics.fmean(answer == demo.expected(row) for row, answer in pairs),
    }


def rewards(trainer: "trl.GRPOTrainer") -> list[float]:
    """Return the mean reward of each step."""
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    sys.exit(main())
