"""The vLLM engine behind its own OpenAI handlers. Only this module and the engine's plugin beside it import vllm."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import uvloop
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from astra_serve.admission import Admitted, engine_rank

# Adapters reach the engine through this process alone: vLLM's own load and unload routes would take any path.
os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if (os.cpu_count() or 1) <= 4:
    # A CPU engine keeps one core free for its other processes; of two cores that is half (measured: 1.25x the tokens).
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

MAX_SLOTS = 8  # adapters in one batch; the engine keeps the others in memory and swaps them in
CPU_KV_CACHE = 2**30  # bytes; vLLM's own default is 92 % of the machine's memory, which a laptop does not have free


def engine_options(base: str, adapters: Sequence[Admitted], extra: Sequence[str]) -> list[str]:
    """Return vLLM's command line for `base` with `adapters`; `extra` options come last, so they win.

    A local base is served under its folder's name, not its path: paths do not belong into a public API.
    """
    options = ["--model", base, "--served-model-name", base_name(base)]
    if adapters:
        slots = min(len(adapters), MAX_SLOTS)
        options += ["--enable-lora", "--max-lora-rank", str(engine_rank(adapters))]
        options += ["--max-loras", str(slots), "--max-cpu-loras", str(len(adapters)), "--lora-modules"]
        options += [
            json.dumps({"name": a.name, "path": str(a.folder), "base_model_name": base_name(base)}) for a in adapters
        ]
    sized = any(option.startswith(("--kv-cache-memory-bytes", "--gpu-memory-utilization")) for option in extra)
    if current_platform.is_cpu() and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE)]
    return [*options, *extra]


def base_name(base: str) -> str:
    """Return the `model` by which requests name the base: a local folder's name, or the hub id as it is."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def parse(options: Sequence[str]) -> Namespace:
    """Parse vLLM's command line with vLLM's own parser; an unknown option exits with its message and status 2."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser(prog="astra-serve")).parse_args(list(options))
    validate_parsed_serve_args(args)
    return args


def serve(args: Namespace) -> None:
    """Run engine and HTTP server until SIGTERM or SIGINT."""
    uvloop.run(run_server(args))
