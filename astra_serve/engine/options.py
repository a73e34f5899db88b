"""vLLM's own options: those that astra-serve sets, those that the user adds, and those that are not for the user."""

import os
from argparse import Namespace
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from astra_serve.adapters.admission import base_name
from astra_serve.adapters.schedule import HEADROOM
from astra_serve.engine.process_guard import PARENT
from astra_serve.engine.vllm_seams import make_arg_parser, validate_parsed_serve_args
from astra_serve.engine.worker_extension import WorkerExtension
from astra_serve.errors import ServeError

# Adapters reach the engine through this process alone: vLLM's own load and unload routes would take any path.
os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "1"  # `engine.watch` ends the server, after its requests got errors
os.environ[PARENT] = "1"
if (os.cpu_count() or 1) <= 4:
    # A CPU engine keeps one core free for its other processes; of two cores that is half (measured: 1.25x the tokens).
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

CPU_KV_CACHE = 2**30  # bytes; vLLM's own default is 92 % of the machine's memory, which a laptop does not have free
OURS = (
    "model",
    "served_model_name",
    "revision",
    "lora_modules",
    "enable_lora",
    "max_cpu_loras",
    "worker_extension_cls",
)


def parse(base: str, rank: int, slots: int, resident: int, extra: Sequence[str]) -> Namespace:
    """Return the settings of vLLM's server for `base`, and LoRAs of up to `rank` (0: none); `extra` is vLLM's own.

    `slots` adapters fit into a batch, `resident` into memory. An option that vLLM does not know exits with vLLM's
    message and status 2. Raises ServeError when `extra` would serve adapters that were not admitted.
    """
    given = {option.partition("=")[0].replace("_", "-") for option in extra}
    ours = {
        "--model": base,
        "--served-model-name": base_name(base),
        "--scheduling-policy": "priority",
        "--worker-extension-cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    }
    if rank:
        room = str(max(resident, slots) + HEADROOM)
        ours |= {"--max-lora-rank": str(rank), "--max-loras": str(slots), "--max-cpu-loras": room}
    sized = given & {"--kv-cache-memory-bytes", "--gpu-memory-utilization"}
    if current_platform.is_cpu() and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        ours["--kv-cache-memory-bytes"] = str(CPU_KV_CACHE)
    overridable = ("--max-lora-rank", "--scheduling-policy")
    words = [word for option, value in ours.items() if not (option in overridable and option in given)
             for word in (option, value)]  # fmt: skip
    words += ["--enable-lora"] if rank else []
    parser = make_arg_parser(FlexibleArgumentParser(prog="astra-serve"))
    alone, args = parser.parse_args(words), parser.parse_args([*words, *extra])
    for option in OURS:
        if getattr(args, option) != getattr(alone, option):
            raise ServeError(f"--{option.replace('_', '-')} is not for vLLM here: use --base and --adapter")
    validate_parsed_serve_args(args)
    checked: Namespace = args
    return checked


def compute(args: Namespace) -> None:
    """Compute for an engine whose server is on another node (vLLM's --headless), until it ends."""
    ServeSubcommand.cmd(args)
