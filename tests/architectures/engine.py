"""Adapters of one architecture in the real engine, as `astra-serve` starts it: admitted, loaded, proved, compared.

Only HTTP is left out. The engine computes in float32 where it can, without compilation, so that its numbers can be
compared with those of plain PEFT. Its processes are forked, where a server spawns them: they then import nothing, which
takes most of the time in which a tiny model starts.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from vllm import envs

from astra_serve.adapters.admission import engine_rank, open_base
from astra_serve.adapters.clock import Clock
from astra_serve.adapters.probe import PROMPTS, Prover
from astra_serve.engine import options
from astra_serve.engine.vllm import started
from tests.architectures.adapters import Adapter
from tests.architectures.row import Failed

OPTIONS = ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "16"]
OPTIONS += ["--kv-cache-memory-bytes", str(2**26)]
START_S = 240.0
# Differences of the log probabilities of the 20 likeliest tokens between engine and PEFT (in float32), in nats, by the
# dtype of the engine: without an adapter, and with one, where twice the difference without it is allowed, too. They are
# the largest in float32. In bfloat16, in which a router may choose another expert, they are the mean, with the limit of
# the server's probe.
OF_BASE = {"float32": 0.03, "bfloat16": 0.3}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


def serve(base: Path, adapters: Mapping[str, Adapter], dtype: str, words: Sequence[str]) -> float:
    """Serve all `adapters` of `base` from one engine; return the difference to PEFT's log probabilities.

    The engine computes in `dtype`; `words` are other options of vLLM. Raises AstraError if the server refuses an
    adapter, Failed if an answer differs, and any error of the engine while it starts.
    """
    admission = open_base(str(base))
    rank = engine_rank(admission.check(adapter.lora).rank for adapter in adapters.values())
    envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"] = lambda: "fork"  # vLLM sets the variable itself
    print("the engine starts", flush=True)
    base_differs, differs = asyncio.run(_serve(base, adapters, rank, ["--dtype", dtype, *OPTIONS, *words]))
    if not base_differs <= OF_BASE[dtype]:
        raise Failed(f"the engine computes the base alone differently, by more than {OF_BASE[dtype]} nats")
    if not differs <= max(TOLERANCE[dtype], 2 * base_differs):
        raise Failed(f"the engine's answers differ by {differs:.1g} nats from those of PEFT")
    return differs


def named_modules(base: Path, adapters: Iterable[Adapter]) -> list[str]:
    """Return vLLM's option that prepares only the modules of `adapters` for LoRA. Raises AstraError."""
    admission = open_base(str(base))
    modules = {module.rpartition(".")[2] for adapter in adapters for module in admission.check(adapter.lora).modules}
    return ["--lora-target-modules", *sorted(modules)]


async def _serve(base: Path, adapters: Mapping[str, Adapter], rank: int, words: Sequence[str]) -> tuple[float, float]:
    """Return the difference between the engine's answers and transformers': of the base, and of the worst adapter."""
    args = options.parse(str(base), rank, len(adapters), len(adapters), words)
    clock, differences = Clock(), []
    async with asyncio.timeout(START_S), started(args, START_S, clock) as engine:
        prover = Prover(engine)
        of_base = next(iter(adapters.values())).of_base
        base_differs = _difference(await engine.next_tokens(PROMPTS, None), of_base, args.dtype)
        for method, adapter in adapters.items():
            handle = await engine.load(method, adapter.lora)
            if left_out := await engine.left_out(handle):
                raise Failed(f"the engine does not adapt {', '.join(left_out)}")
            if base_differs <= OF_BASE[args.dtype]:
                await prover.prove(handle, adapter.lora)
            differences.append(_difference(await engine.next_tokens(PROMPTS, handle), adapter.of_peft, args.dtype))
    return base_differs, max(differences)


def _difference(answers: Sequence[Mapping[int, float]], expected: torch.Tensor, dtype: str) -> float:
    """Return the difference of log probabilities over the tokens in `answers`, one for each row expected; or NaN."""
    differences = [
        abs(value - float(row[token]))
        for answer, row in zip(answers, expected, strict=True)
        for token, value in answer.items()
    ]
    return math.nan if any(map(math.isnan, differences)) else {"float32": max, "bfloat16": fmean}[dtype](differences)
