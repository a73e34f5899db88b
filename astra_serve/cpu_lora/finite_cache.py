"""Keys and values enter the attention cache as finite numbers: one adapter's overflow cannot reach other requests.

vLLM's CPU attention multiplies whole blocks of the cache, and masks the part that a request does not use with 0. A NaN
or an infinity that an earlier request left there gives NaN all the same (0 * NaN), and the answer is wrong.
"""

import inspect
import logging
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

logger = logging.getLogger(f"vllm.{__name__}")

LARGEST = 1e15  # a product with a query, summed over a head, is still finite in float32
_PARAMETERS = ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]


def keep_finite() -> None:
    """Let the attention of this process write finite numbers alone; once."""
    write = CPUAttentionBackendImpl.do_kv_cache_update
    if hasattr(write, "of_any_numbers"):
        return
    if list(inspect.signature(write).parameters) != _PARAMETERS:
        logger.warning("this vLLM writes its attention cache differently: an adapter that overflows may harm others")
        return

    def do_kv_cache_update(
        self: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: Any
    ) -> None:
        write(self, layer, finite(key), finite(value), kv_cache, slot_mapping)

    do_kv_cache_update.of_any_numbers = write  # type: ignore[attr-defined]
    CPUAttentionBackendImpl.do_kv_cache_update = do_kv_cache_update


def finite(numbers: torch.Tensor) -> torch.Tensor:
    """Return the numbers with NaN as 0, and none larger than LARGEST or than their dtype holds."""
    largest = min(LARGEST, torch.finfo(numbers.dtype).max)
    return numbers.nan_to_num(0.0).clamp(-largest, largest)
