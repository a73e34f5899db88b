"""LoRA on a CPU without copying the adapter once per token: a plugin of the engine, on by default.

vLLM's CPU path gathers one copy of the adapter's weights for every token, and for a request without an adapter (slot
-1) that gather takes the *last slot's* adapter, so in a mixed batch the base answers with somebody else's weights.
Here the tokens of a step are grouped by slot once; each group and slice then takes two matrix products on the weights
where they lie, at the adapter's true rank; tokens without an adapter are not touched.

It is registered under `vllm.general_plugins`, so it also works for `vllm serve`. ASTRA_CPU_LORA=0 switches it off; on
another platform nothing of it loads.
"""

import inspect
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

logger = logging.getLogger(__name__)

Rows = slice | torch.Tensor
Group = tuple[int, Rows]  # a slot and its rows of the batch
_EXPECTED = {
    "add_shrink": ["y", "x", "lora_a_stacked", "scale"],
    "add_expand": ["y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"],
    "add_lora_embedding": ["y", "x", "lora_b_stacked", "add_inputs"],
    "add_lora_linear": ["y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer"],
    "add_lora_logits": ["y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer"],
    "update_metadata": ["mapping", "lora_index_to_id", "max_loras", "vocab_size"],
}


def group_by_slot(slots: torch.Tensor) -> list[Group]:
    """Return (slot, rows) for every slot that occurs in `slots` (n_rows,); rows of slot -1 belong to no group.

    Consecutive rows come as a slice, which indexes without a copy; others as an index tensor.
    """
    groups: list[Group] = []
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            rows = (slots == slot).nonzero().flatten()
            first, last = int(rows[0]), int(rows[-1])
            groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """vLLM's CPU wrapper with its products taken per adapter instead of per token.

    Stacked weights are the engine's: A (slots, 1, max_rank, d_in), B (slots, 1, d_out, max_rank). Products are taken in
    the weights' dtype, where the CPU kernels accumulate in float32; the change is added to the output before rounding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.token_groups: list[Group] = []
        self.sampler_groups: list[Group] = []
        self.slot_ranks: dict[int, int] = {}
        _watch_slots()

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Group the rows of the coming step, once for all layers."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.token_groups = group_by_slot(self.token_lora_indices)
        self.sampler_groups = group_by_slot(self.sampler_indices)

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
        del buffer  # the stock path's scratch space
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self.token_groups:
            x_rows = x[rows]
            offset = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                self._expand(y, rows, offset, width, self._shrink(x_rows, a, slot, scale), b, slot)
                offset += width

    def add_shrink(
        self, y: Any, x: torch.Tensor, lora_a_stacked: Sequence[torch.Tensor], scale: float, **_: Any
    ) -> None:
        """Set y[i] (n_rows, max_rank) to scale * A_i x on rows that have an adapter."""
        x = x.view(-1, x.shape[-1])
        for slot, rows in self.token_groups:
            for out, a in zip(y, lora_a_stacked, strict=True):
                inner = self._shrink(x[rows], a, slot, scale)
                out.view(-1, out.shape[-1])[rows, : inner.shape[1]] = inner.to(out.dtype)

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
        y = y.view(-1, y.shape[-1])
        for slot, rows in self.token_groups:
            offset = offset_start
            for inner, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
                rows_of_inner = inner.view(-1, inner.shape[-1])[rows]
                self._expand(y, rows, offset, width, rows_of_inner, b, slot, replace=not add_inputs)
                offset += width

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """Add B x to y (n_rows, d) for x (n_rows, max_rank), the rows of A that the engine looked up."""
        for slot, rows in self.token_groups:
            self._expand(y, rows, 0, y.shape[1], x[rows], lora_b_stacked, slot, replace=not add_inputs)

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
        """Add scale * B A x to the logits y (n_sampled, vocabulary); rows follow the sampler's mapping."""
        del buffer
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self.sampler_groups:
            inner = self._shrink(x[rows], lora_a_stacked, slot, scale)
            self._expand(y, rows, 0, y.shape[1], inner, lora_b_stacked, slot)

    def _shrink(self, x: torch.Tensor, a_stacked: torch.Tensor, slot: int, scale: float) -> torch.Tensor:
        """Return scale * A x (n, r) in the dtype of A, r being the slot's true rank."""
        a = a_stacked[slot].flatten(0, -2)
        a = a[: self.slot_ranks.get(slot, len(a))]
        inner = x.to(a.dtype) @ a.T
        return inner if scale == 1 else inner * scale

    def _expand(
        self,
        y: torch.Tensor,
        rows: Rows,
        offset: int,
        width: int,
        inner: torch.Tensor,
        b_stacked: torch.Tensor,
        slot: int,
        *,
        replace: bool = False,
    ) -> None:
        """Add B inner (n, width) to y[rows, offset : offset + width], or put it there."""
        b = b_stacked[slot].flatten(0, -2)[:width, : inner.shape[1]]
        target = y.narrow(1, offset, len(b))  # the engine pads some outputs beyond the adapter's
        before = torch.zeros((), dtype=b.dtype) if replace else target[rows].to(b.dtype)
        after = torch.addmm(before, inner.to(b.dtype), b.T)
        target[rows] = after.to(y.dtype)


def register() -> None:
    """Entry point of `vllm.general_plugins`: put the wrapper in place of the engine's on CPU platforms."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("ASTRA_CPU_LORA", "1") == "0":
        return
    for method, names in _EXPECTED.items():
        found = [name for name in inspect.signature(getattr(PunicaWrapperCPU, method)).parameters if name != "kwargs"]
        if found != ["self", *names]:
            logger.warning("this vLLM's %s takes %s: astra's CPU LoRA stays off, the stock path serves", method, found)
            return
    name = f"{GroupedPunicaWrapper.__module__}.{GroupedPunicaWrapper.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda _: name)


def _watch_slots() -> None:
    """Learn the rank of every adapter that the engine writes into a slot; called in the worker process alone."""
    from vllm.lora.model_manager import LoRAModelManager  # takes seconds, and the other processes never need it

    if not getattr(LoRAModelManager.activate_adapter, "records_ranks", False):
        LoRAModelManager.activate_adapter = _recording_ranks(LoRAModelManager.activate_adapter)


def _recording_ranks(activate: Any) -> Any:
    """Wrap `LoRAModelManager.activate_adapter`, which writes an adapter into a slot, to tell the wrappers its rank."""

    def activate_adapter(self: Any, lora_id: int) -> bool:
        activated: bool = activate(self, lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            halves = [layer.lora_a for layer in self._registered_adapters[lora_id].loras.values()]
            flat = [a for half in halves for a in (half if isinstance(half, list) else [half]) if a is not None]
            rank = max((a.shape[-2] for a in flat), default=0)
            for wrapper in self.punica_wrapper_mapping.values():
                if isinstance(wrapper, GroupedPunicaWrapper):
                    wrapper.slot_ranks[slot] = rank
        return activated

    activate_adapter.records_ranks = True  # type: ignore[attr-defined]
    return activate_adapter
