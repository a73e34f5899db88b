"""Reinforcement learning publishes a policy at every step: is each rollout its policy's, and what does a publish cost?

    python -m benchmarks.rollout --out FILE.json [--quick] [--steps 500] [--every 1] [--adapter DIR [--base DIR]]

8 prompts with 4 samples each are in flight all the time. Once a second (`--every`) a trainer publishes a new policy as
TRL's AsyncGRPOTrainer does: pause, write the adapter, load it under a new name, resume, unload the policy that is
older than the staleness of 3. The policies are one trained adapter plus noise. The rival is vLLM's own server under
the same client, with the same CPU kernel.

    publish         seconds of the load call: from its begin until the policy serves
    tokens_ratio    tokens per second while policies are published, divided by those of the steady phases before and
                    after: the median over 20 blocks of steps
    wrong_version   rollouts whose sampled log probabilities are not those of the policy that the answer names, computed
                    again in float32: they differ by more than 0.3 nats per token, the bound of the server's own probe.
                    Of each policy, the first and the last two rollouts are compared. `before` is the same with the
                    policy before the named one: it shows that a wrong policy would be seen
    failed          rollouts that got an error
    rss_growth      memory of all processes of the server: the last tenth of the steps over the second tenth

The two servers run one after the other. Without --adapter, that adapter is trained first (half a minute).
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from astra_serve.adapters.probe import MOST_DEVIATION
from benchmarks import report
from benchmarks.policies import Policies, Recomputed
from benchmarks.rollout_load import NAME, PROMPTS, SAMPLES, SEED, STALENESS, Pace, Rollout, measure
from tests.support import demo
from tests.support.load import quantiles
from tests.support.server import Server, astra_serve, free_port, vllm_serve
from trainer.embedded import tasks

WARM_UP_S = 60.0  # under any load the engine's worker grows in the first minute
TOKEN = "benchmark"  # noqa: S105
COMPARED = 4  # rollouts of each policy whose log probabilities are computed again: the first and the last two
EACH = 10  # policies, of which one is compared with the policy before it
SLOTS = STALENESS + 2  # policies that rollouts may name at a time, as TRL wants
KEPT = 4 * SLOTS  # policies in vLLM's memory: it reads others from their folders again, and the trainer removes those
RANK = 64  # the largest that the engines serve
TARGETS = {"wrong_version": 0, "failed": 0, "tokens_ratio": 0.9, "rss_growth": 1.02, "publish_p50_s": 0.25}
PREFIXES = {"astra-serve": "", "vllm": "stock_"}  # of the summary's keys, by server
KEYS = ("steps", "publish_p50_s", "publish_p99_s", "tokens_ratio", "wrong_version", "failed", "rss_growth")
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--steps", type=int, default=500, help="policies (default: 500)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one step to the next (default: 1)")
    parser.add_argument("--quick", action="store_true", help="smoke run: 40 steps, 2 s of warm-up")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA of the base")
    parser.add_argument("--base", type=Path, default=demo.BASE, help="(default: the embedded base)")
    only = "measure one server alone, and keep the other one's case if FILE has it"
    parser.add_argument("--only", choices=["astra-serve", "vllm"], help=only)
    args = parser.parse_args()
    if args.base != demo.BASE and not args.adapter:
        parser.error("--base needs --adapter, a LoRA of it")
    pace = Pace(40, args.every, 2.0) if args.quick else Pace(args.steps, args.every, WARM_UP_S)
    env, cases = report.environment(SEED), _cases(args.out) if args.only else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        trained = args.adapter or _train(folder)
        for name, start in (("astra-serve", ours), ("vllm", stock)):
            if args.only not in (None, name):
                continue
            policies = Policies(trained, folder / name)
            with start(folder, args.base) as (server, url):
                found, rollouts, versions = asyncio.run(measure(server, url, args.base, policies, pace))
            cases[name] = {"server": name, **found, **compare(rollouts, versions, Recomputed(args.base, policies))}
            report.write(args.out, summarise(cases), list(cases.values()), env)
    show(list(cases.values()))
    return 0


@contextmanager
def ours(folder: Path, base: Path) -> Iterator[tuple[Server, str]]:
    """Start `astra-serve`, and yield it and the URL of its policy port."""
    port = free_port()
    os.environ["ASTRA_POLICY_TOKEN"] = TOKEN
    options = ["--base", str(base), "--policy-port", str(port), "--adapter-root", str(folder), "--enforce-eager"]
    options += ["--max-loras", str(SLOTS), "--max-lora-rank", str(RANK)]
    with astra_serve(options, folder / "ours.log") as server:
        yield server, f"http://x:{TOKEN}@127.0.0.1:{port}"


@contextmanager
def stock(folder: Path, base: Path) -> Iterator[tuple[Server, str]]:
    """Start vLLM's server as TRL's documentation says, and yield it and its URL."""
    options = ["--model", str(base), "--served-model-name", "base", "--enforce-eager", "--enable-lora"]
    options += ["--max-loras", str(SLOTS), "--max-cpu-loras", str(KEPT), "--max-lora-rank", str(RANK)]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with vllm_serve(options, folder / "stock.log", environment) as server:
        yield server, server.url


def compare(rollouts: list[Rollout], versions: dict[int, str], recomputed: Recomputed) -> dict[str, Any]:
    """Compare rollouts with the policy that each answer names, and count those that are another policy's."""
    by_policy: dict[int, list[Rollout]] = {}
    for one in rollouts:
        by_policy.setdefault(one.asked, []).append(one)
    wrong, named, before = 0, list[float](), list[float]()
    for number, found in track(sorted(by_policy.items()), "comparing", console=console, transient=True):
        wrong += sum(one.model not in (versions[number], f"{NAME}-v{number}") for one in found)
        some = [one for one in found if one.tokens]
        some = some if len(some) <= COMPARED else some[: COMPARED // 2] + some[-COMPARED // 2 :]
        sampled = [(one.prompt, one.tokens, one.logprobs) for one in some]
        own = recomputed.deviations(number, sampled)
        wrong += sum(deviation > MOST_DEVIATION for deviation in own)
        named += own
        before += recomputed.deviations(number - 1, sampled) if number % EACH == 0 else []
    return {
        "wrong_version": wrong,
        "compared": len(named),
        "policies_compared": len(by_policy),
        "deviation": quantiles(named),
        "before": {**quantiles(before), "min": min(before, default=None)},
    }


def summarise(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of `astra-serve`, and those of vLLM with `stock_` before their names."""
    found: dict[str, Any] = {}
    for prefix, case in ((prefix, cases[name]) for name, prefix in PREFIXES.items() if name in cases):
        flat = {**case, "publish_p50_s": case["publish_s"].get("p50"), "publish_p99_s": case["publish_s"].get("p99")}
        found |= {f"{prefix}{key}": flat[key] for key in KEYS}
    return {**found, "targets": TARGETS}


def _cases(out: Path) -> dict[str, dict[str, Any]]:
    """Return the cases of a result file, by server; none where there is no such file."""
    found = json.loads(out.read_text())["cases"] if out.exists() else []
    return {case["server"]: case for case in found}


def show(cases: list[dict[str, Any]]) -> None:
    title = f"{PROMPTS} prompts x {SAMPLES} samples in flight, a policy each {cases[0]['every_s']:g} s"
    table = Table("", *(case["server"] for case in cases), title=title)
    for key in ("steps", "rollouts", "failed", "wrong_version", "compared", "tokens_ratio", "rss_growth"):
        table.add_row(key, *(f"{case[key]:.4g}" if isinstance(case[key], float) else str(case[key]) for case in cases))
    for name, key, unit in (
        ("publish", "publish_s", "s"),
        ("deviation", "deviation", "nats"),
        ("before", "before", "nats"),
    ):
        for p in ("p50", "p99", "max"):
            table.add_row(f"{name}, {p}", *(f"{case[key].get(p, float('nan')):.3f} {unit}" for case in cases))
    console.print(table)
    for case in cases:
        for line in (*case["examples"], *([case["broken"]] if case["broken"] else [])):
            console.print(f"{case['server']}: {line}", highlight=False, markup=False)


def _train(folder: Path) -> Path:
    tasks.write(folder / "data")
    return demo.train_and_convert("sql", folder)


if __name__ == "__main__":
    sys.exit(main())
