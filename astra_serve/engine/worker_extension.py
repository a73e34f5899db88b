"""Runs inside the engine's workers: what the server asks of them, and two mends of how they treat adapters.

vLLM mixes this class into its worker's.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from converter.adapter_dir.patterns import pattern_value


class WorkerExtension:
    """The calls that `collective_rpc` can make of a worker beside vLLM's own."""

    model_runner: Any  # the worker's

    def mend_adapters(self) -> None:
        """Mend how this worker treats adapters, once, before the first. Raises RuntimeError where vLLM looks different.

        Keys of rank_pattern and alpha_pattern are compared as names, which admission requires: vLLM compiles a regular
        expression for each key and module, 12 s for 2,000 keys.

        Log probabilities of prompts are computed without the adapters of the output layer: vLLM computes these logits
        outside of the batch, and takes the adapters of whichever requests have those rows in the batch. The gateway
        refuses them for a request whose own adapter changes the output layer.
        """
        from vllm.lora.layers import LogitsProcessorWithLoRA
        from vllm.lora.peft_helper import PEFTHelper

        if self._adapters is None:
            return
        of_prompts = [  # of vLLM's two model runners
            (owner, name)
            for owner, name in (
                (self.model_runner, "_get_prompt_logprobs_dict"),
                (getattr(self.model_runner, "prompt_logprobs_worker", None), "compute_prompt_logprobs"),
            )
            if hasattr(owner, name)
        ]
        heads = [module for module in self._adapters.modules.values() if isinstance(module, LogitsProcessorWithLoRA)]
        if not hasattr(PEFTHelper, "_match_pattern") or (heads and not of_prompts):
            raise RuntimeError("this vLLM computes with adapters differently: install vllm 0.32 or 0.33")
        PEFTHelper._match_pattern = staticmethod(lambda pattern, name: pattern_value(pattern, name, None))
        for owner, name in of_prompts:
            setattr(owner, name, _without_adapters(getattr(owner, name), heads))

    def adapters_in_slots(self) -> list[int]:
        """Return the ids of the adapters in the slots of the batch, on the device; none without LoRA."""
        if self._adapters is None:
            return []
        return [number for number in self._adapters.lora_index_to_id if number is not None]

    def modules_left_out(self, number: int) -> list[str]:
        """Return the modules of a loaded adapter that no layer of this worker takes: the engine ignores them."""
        adapter = self._adapters._registered_adapters[number]
        taken = {id(self._adapters._get_lora_layer_weights(adapter, name)) for name in self._adapters.modules}
        return [name for name, weights in adapter.loras.items() if id(weights) not in taken]

    @property
    def _adapters(self) -> Any:
        """The worker's manager of adapters; None without LoRA."""
        manager = getattr(self.model_runner, "lora_manager", None)
        return None if manager is None else manager._adapter_manager


def _without_adapters(compute: Callable[..., Any], heads: Sequence[Any]) -> Callable[..., Any]:
    """Return `compute` such that the output layers `heads` answer as those of the base while it runs."""

    @wraps(compute)
    def computed(*args: Any, **settings: Any) -> Any:
        for head in heads:
            head._get_logits = partial(_logits_of_base, head)
        try:
            return compute(*args, **settings)
        finally:
            for head in heads:
                del head._get_logits

    return computed


def _logits_of_base(head: Any, hidden_states: Any, lm_head: Any, *settings: Any) -> Any:
    return head.base_layer._get_logits(hidden_states, getattr(lm_head, "base_layer", lm_head), *settings)
