"""LoRA on a CPU at nearly the speed of the base: a plugin of the engine, on by default.

vLLM's CPU path gathers one copy of the adapter's weights for every token, and for a request without an adapter (slot
-1) that gather takes the *last slot's* adapter, so in a mixed batch the base answers with another adapter's weights.
Here the tokens of a step are grouped by slot once; each group is multiplied with its adapter's weights where they lie,
at the adapter's true rank, and tokens without an adapter are not touched.

    __init__          switches it on in the engine
    wrapper           the class that the engine calls
    finite_cache      one adapter's overflow does not reach other requests
    experts           bases with experts, whose adapters leave the experts as they are
    ops               the same calls as PyTorch operators, so that compiled models can hold them
    grouped_lora.cpp  the operator that matters for speed, for CPUs with AVX-512 BF16

It is registered under `vllm.general_plugins`, so it also works for `vllm serve`. ASTRA_CPU_LORA=0 switches it off; on
another platform nothing of it loads.
"""

import inspect
import logging
import multiprocessing
import os
import shutil
from typing import Any

from astra_serve.cpu_lora.experts import compute_without_lora

logger = logging.getLogger(f"vllm.{__name__}")  # under vLLM's logger: its handler, level and format

_EXPECTED = {
    "add_shrink": ["y", "x", "lora_a_stacked", "scale"],
    "add_expand": ["y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"],
    "add_lora_embedding": ["y", "x", "lora_b_stacked", "add_inputs"],
    "add_lora_linear": ["y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer"],
    "add_lora_logits": ["y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer"],
    "update_metadata": ["mapping", "lora_index_to_id", "max_loras", "vocab_size"],
}


def register() -> None:
    """Entry point of `vllm.general_plugins`: put the wrapper in place of the engine's on CPU platforms."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    _allow_amx()
    if os.environ.get("ASTRA_CPU_LORA", "1") == "0":
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for method, names in _EXPECTED.items():
        found = [name for name in inspect.signature(getattr(PunicaWrapperCPU, method)).parameters if name != "kwargs"]
        if found != ["self", *names]:
            logger.warning("this vLLM's %s takes %s: astra's CPU LoRA stays off, the stock path serves", method, found)
            return
    if multiprocessing.current_process().name.startswith("VllmWorker"):  # for others this imports for seconds
        compute_without_lora()
    platform = type(current_platform)
    platform.get_punica_wrapper = classmethod(lambda _: f"{__name__}.wrapper.GroupedPunicaWrapper")
    if not hasattr(platform.check_and_update_config, "keeps_compilation"):
        platform.check_and_update_config = classmethod(_keeping_compilation(platform.check_and_update_config))


def _allow_amx() -> None:
    """Ask Linux for the use of AMX, where the CPU has it.

    vLLM 0.32's attention uses AMX and relies on other libraries to have asked: where they have not (a small model in
    bfloat16), the worker dies with SIGILL at the first request.
    """
    import torch

    if hasattr(torch.cpu, "_init_amx") and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _keeping_compilation(check: Any) -> Any:
    """Wrap the platform's check of a configuration, which turns compilation off where LoRA is on.

    The stock path cannot be compiled, this one can. `--enforce-eager` turns compilation off as it does everywhere, and
    so does a machine without the C++ compiler that it takes.
    """

    def check_and_update_config(_: type, vllm_config: Any) -> None:
        if not shutil.which(os.environ.get("CXX", "g++")):  # one name, without options: so PyTorch's compiler reads it
            check(vllm_config)
            return
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            check(vllm_config)
        finally:
            vllm_config.lora_config = lora

    check_and_update_config.keeps_compilation = check  # type: ignore[attr-defined]
    return check_and_update_config
