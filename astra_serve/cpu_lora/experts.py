"""Experts of a base on a CPU, beside adapters that leave them as they are.

Up to vLLM 0.32 all experts are computed with Triton as soon as LoRA is on. A CPU does not have it, and the engine dies
at the first request. Where `--lora-target-modules` names no experts, they are computed here as without LoRA.
"""

import functools
import logging
from typing import Any

logger = logging.getLogger(f"vllm.{__name__}")


def compute_without_lora() -> None:
    """Let vLLM choose the CPU's own kernels for experts that no adapter may change; once in each process."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    if "is_lora_enabled" not in FusedMoEConfig.__dataclass_fields__:
        logger.warning("this vLLM configures experts differently: a base with experts may need Triton for LoRA")
    elif not hasattr(FusedMoEConfig.__post_init__, "__wrapped__"):
        FusedMoEConfig.__post_init__ = _without_lora(FusedMoEConfig.__post_init__)


def _without_lora(original: Any) -> Any:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807
        if self.is_lora_enabled and not _may_change_experts():
            self.is_lora_enabled = False
        original(self)

    return __post_init__


def _may_change_experts() -> bool:
    """Return whether the options of the engine that starts allow adapters of experts."""
    from vllm.config import get_current_vllm_config

    lora = get_current_vllm_config().lora_config
    return lora is None or lora.target_modules is None or any("experts" in name for name in lora.target_modules)
