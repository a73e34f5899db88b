"""The vLLM engine behind its own OpenAI handlers. Only this module and the engine's plugin beside it import vllm."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence

import uvloop
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from astra_serve.admission import Admitted, base_name, engine_rank
from astra_serve.errors import ServeError

# Adapters reach the engine through this process alone: vLLM's own load and unload routes would take any path.
os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if (os.cpu_count() or 1) <= 4:
    # A CPU engine keeps one core free for its other processes; of two cores that is half (measured: 1.25x the tokens).
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

CPU_KV_CACHE = 2**30  # bytes; vLLM's own default is 92 % of the machine's memory, which a laptop does not have free


def parse(base: str, adapters: Sequence[Admitted], max_loras: int, extra: Sequence[str]) -> Namespace:
    """Return the settings of vLLM's server for `base` with `adapters`; `extra` is vLLM's own options.

    An option that vLLM does not know exits with vLLM's message and status 2. Raises ServeError when `extra` would serve
    what was not admitted.
    """
    ours = ["--model", base, "--served-model-name", base_name(base)]
    if adapters:
        ours += ["--enable-lora", "--max-lora-rank", str(engine_rank(adapters)), "--max-loras", str(max_loras)]
        ours += ["--max-cpu-loras", str(max(len(adapters), max_loras)), "--lora-modules"]
        ours += [
            json.dumps({"name": a.name, "path": str(a.folder), "base_model_name": base_name(base)}) for a in adapters
        ]
    sized = any(option.startswith(("--kv-cache-memory-bytes", "--gpu-memory-utilization")) for option in extra)
    if current_platform.is_cpu() and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        ours += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE)]
    parser = make_arg_parser(FlexibleArgumentParser(prog="astra-serve"))
    alone, args = parser.parse_args(ours), parser.parse_args([*ours, *extra])
    for option in ("model", "served_model_name", "revision", "lora_modules", "enable_lora"):
        if getattr(args, option) != getattr(alone, option):
            raise ServeError(f"--{option.replace('_', '-')} is not for vLLM here: use --base and --adapter")
    validate_parsed_serve_args(args)
    checked: Namespace = args
    return checked


def serve(args: Namespace) -> None:
    """Run engine and HTTP server until SIGTERM or SIGINT."""
    uvloop.run(run_server(args))
