"""The class that the engine calls: vLLM's CPU wrapper, with products per adapter instead of per token."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from astra_serve.cpu_lora import finite_cache, ops

KINDS = ("linear", "embedding", "logits", "experts")
UNKNOWN_RANK = torch.iinfo(torch.int32).max  # the products then take every row that the engine has


class Groups:
    """The rows of a step by adapter slot, in tensors that stay where they are, because compiled models hold them.

    rows: int32 (max_rows,), the numbers of the rows: first those without an adapter, then slot 0's, slot 1's, ...
    starts: int32 (slots + 1,); slot s has rows[starts[s] : starts[s + 1]], in ascending order.
    """

    def __init__(self, max_rows: int, slots: int) -> None:
        self.rows = torch.zeros(max_rows, dtype=torch.int32)
        self.starts = torch.zeros(slots + 1, dtype=torch.int32)

    def update(self, slots: torch.Tensor) -> None:
        """Group the rows of a step by their `slots` (n_rows,), -1 being a row without an adapter."""
        self.rows[: len(slots)] = torch.argsort(slots, stable=True)
        self.starts.copy_(torch.bincount(slots + 1, minlength=len(self.starts)).cumsum(0))


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """vLLM's CPU wrapper over `ops`; stacked experts, which do not call it, read its rows (see `experts`).

    Stacked weights are the engine's: A (slots, 1, max_rank, d_in), B (slots, 1, d_out, max_rank). The tensors of a call
    may have more rows than the step (padding), which are not touched, but not fewer.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, *, lora_config: Any, **_: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self.tokens = Groups(max_num_batched_tokens, lora_config.max_loras)
        self.samples = Groups(max_num_batched_tokens, lora_config.max_loras)
        # The largest rank that each slot's adapter has in each kind of layer. The engine wraps embeddings and logits
        # whether an adapter changes them or not: where it does not, the rank is 0 and nothing is computed.
        self.ranks = {kind: torch.full((lora_config.max_loras,), UNKNOWN_RANK, dtype=torch.int32) for kind in KINDS}
        self.linear = ops.fastest_lora_linear()
        _watch_slots()
        finite_cache.keep_finite()

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Group the rows of the coming step, once for all layers."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.tokens.update(self.token_lora_indices)
        self.samples.update(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Any = None,
        **_: Any,
    ) -> None:
        """Add scale * B A x to each slice of y (n_rows, sum of slices), in place, for x (n_rows, d_in)."""
        del output_slices, buffer  # the widths of the Bs; the stock path's scratch space
        groups, y, x = self.tokens, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        a, b = list(lora_a_stacked), list(lora_b_stacked)
        self.linear(y, x, a, b, groups.rows, groups.starts, self.ranks["linear"], scale)

    def add_shrink(
        self, y: Any, x: torch.Tensor, lora_a_stacked: Sequence[torch.Tensor], scale: float, **_: Any
    ) -> None:
        """Set y[i] (n_rows, max_rank) to scale * A_i x on rows that have an adapter."""
        groups, x = self.tokens, x.view(-1, x.shape[-1])
        inner = [out.view(-1, out.shape[-1]) for out in y]
        ops.lora_shrink(inner, x, list(lora_a_stacked), groups.rows, groups.starts, self.ranks["linear"], scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """Add B_i x[i] to slice i of y, in place; with `add_inputs` false, put it there."""
        self._expand(y, x, lora_b_stacked, "linear", list(output_slices), offset_start, add_inputs)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """Add B x to y (n_rows, d) for x (n_rows, max_rank), the rows of A that the engine looked up."""
        self._expand(y, [x], [lora_b_stacked], "embedding", [y.shape[-1]], 0, add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **_: Any,
    ) -> None:
        """Add scale * B A x to the logits y (n_sampled, vocabulary); rows follow the sampler's mapping.

        For `prompt_logprobs` vLLM asks for the logits of one request's prompt, and does not name the request: where the
        requests of the step differ in their adapters, these logits stay those of the base.
        """
        del buffer
        groups, y, x = self.samples, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        slots = self.sampler_indices
        if len(slots) != len(y):
            if len(slots.unique()) != 1:
                return
            groups = Groups(len(y), len(groups.starts) - 1)
            groups.update(slots[:1].expand(len(y)))
        self.linear(y, x, [lora_a_stacked], [lora_b_stacked], groups.rows, groups.starts, self.ranks["logits"], scale)

    def _expand(
        self, y: torch.Tensor, x: Any, b: Sequence[torch.Tensor], kind: str, widths: list[int], offset: int, add: bool
    ) -> None:
        groups, y, inner = self.tokens, y.view(-1, y.shape[-1]), [part.view(-1, part.shape[-1]) for part in x]
        ops.lora_expand(y, inner, list(b), groups.rows, groups.starts, self.ranks[kind], widths, offset, add)


def _watch_slots() -> None:
    """Learn the ranks of every adapter that the engine writes into a slot; called in the worker process alone."""
    from vllm.lora.model_manager import LoRAModelManager  # takes seconds, and the other processes never need it

    if not getattr(LoRAModelManager.activate_adapter, "records_ranks", False):
        LoRAModelManager.activate_adapter = _recording_ranks(LoRAModelManager.activate_adapter)


def _recording_ranks(activate: Any) -> Any:
    """Wrap `LoRAModelManager.activate_adapter`, which writes an adapter into a slot: the wrappers note its ranks."""

    def activate_adapter(self: Any, lora_id: int) -> bool:
        wrappers = [one for one in self.punica_wrapper_mapping.values() if isinstance(one, GroupedPunicaWrapper)]
        try:
            activated: bool = activate(self, lora_id)
        except BaseException:  # the slot may hold parts of two adapters: its ranks are unknown
            for wrapper in wrappers:
                for known in wrapper.ranks.values():
                    known[:] = UNKNOWN_RANK
            raise
        if activated:
            slot, adapter = self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id]
            weights = {name: self._get_lora_layer_weights(adapter, name) for name in self.modules}
            for kind, rank in largest_ranks(self.modules, weights).items():
                for wrapper in wrappers:
                    wrapper.ranks[kind][slot] = rank
        return activated

    activate_adapter.records_ranks = True  # type: ignore[attr-defined]
    return activate_adapter


def largest_ranks(modules: dict[str, Any], weights: dict[str, Any]) -> dict[str, int]:
    """Return the largest rank of an adapter in each kind of layer, 0 where it has none; `weights` by module name."""
    from vllm.lora.layers import (
        ClassificationHeadWithLoRA,
        FusedMoEWithLoRA,
        LogitsProcessorWithLoRA,
        VocabParallelEmbeddingWithLoRA,
    )

    ranks = dict.fromkeys(KINDS, 0)
    for name, module in modules.items():
        if weights[name]:
            # The kind is the method of the wrapper that the layer calls: both heads call add_lora_logits.
            kind = "logits" if isinstance(module, LogitsProcessorWithLoRA | ClassificationHeadWithLoRA) else "linear"
            kind = "embedding" if isinstance(module, VocabParallelEmbeddingWithLoRA) else kind
            kind = "experts" if isinstance(module, FusedMoEWithLoRA) else kind
            halves = weights[name].lora_a if isinstance(weights[name].lora_a, list) else [weights[name].lora_a]
            ranks[kind] = max([ranks[kind], *(a.shape[-2] for a in halves if a is not None)])
    return ranks
