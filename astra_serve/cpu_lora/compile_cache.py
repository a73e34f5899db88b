"""A CPU engine loads its compiled model from disk at the next start, instead of compiling it again.

vLLM 0.32 writes the compiled model to its cache. At the next start it reads the file, calls `finalize_loading` of the
function in it, and compiles again because there is none: only vLLM's own backend, which CPU engines do not use, makes
functions that need this call.

A compiled model holds code for the instructions of one kind of CPU, which vLLM's key of the cache does not name. Here
it does, so that a cache on a shared volume is safe for nodes with different CPUs.
"""

from functools import wraps
from typing import Any

import torch


def load_compiled_models() -> None:
    """Give the compiled functions that PyTorch loads from now on a `finalize_loading` without effect."""
    load = torch.compiler.load_compiled_function
    if hasattr(load, "finalizes"):
        return

    @wraps(load)
    def finalizing(*args: Any, **options: Any) -> Any:
        loaded: Any = load(*args, **options)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda _config: None
        return loaded

    finalizing.finalizes = True  # type: ignore[attr-defined]
    torch.compiler.load_compiled_function = finalizing


def separate_by_cpu(vllm_config: Any) -> None:
    """Make the instructions of this CPU a part of the key under which the engine's compiled model is kept."""
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["compiled_for"] = dict(torch.cpu.get_capabilities())
