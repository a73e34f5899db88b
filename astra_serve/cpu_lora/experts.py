"""LoRA on the experts of a mixture of experts.

With LoRA, vLLM computes unquantised experts by Triton kernels alone, on every platform. A CPU has none: the engine died
at the first request, for the base as well and also where no adapter changes an expert. Here each expert that a step
routes tokens to is computed by PyTorch's matrix products, and with them the changes of the adapters. Where
`--lora-target-modules` names no experts, they are computed as without LoRA, by vLLM's own kernels.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

from astra_serve.cpu_lora import ops

logger = logging.getLogger(f"vllm.{__name__}")

_ACTIVATIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
_BY_NAME = {activation.value: function for activation, function in _ACTIVATIONS.items()}

ops.library.define(
    "lora_experts(Tensor(a!) y, Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor ids, Tensor[] a13, "
    "Tensor[] b13, Tensor[] a2, Tensor[] b2, Tensor rows, Tensor starts, Tensor ranks, str activation) -> ()"
)
lora_experts = torch.ops.astra.lora_experts.default
torch.library.register_fake("astra::lora_experts", lambda *_: None, lib=ops.library)


def compute_experts_here() -> None:
    """Let the engine of this process compute unquantised experts by `LoraExperts` where LoRA is on; once."""
    select = method.select_unquantized_moe_backend
    if hasattr(select, "without_lora"):
        return
    if list(inspect.signature(select).parameters) != ["moe_config"]:
        logger.warning("this vLLM selects the code of experts differently: it may not serve mixtures of experts here")
        return

    def select_backend(moe_config: Any) -> tuple[Any, Any]:
        if moe_config.is_lora_enabled and not _may_change_experts():
            moe_config.is_lora_enabled = False  # the kernels ask again
        if not moe_config.is_lora_enabled:
            return select(moe_config)  # type: ignore[no-any-return]
        form = FusedMoEActivationFormat.Standard
        supported, reason = LoraExperts.is_supported_config(LoraExperts, moe_config, None, None, form)
        if not supported or moe_config.has_bias:
            reason = reason or "experts with a bias are not supported"
            raise ValueError(
                f"LoRA cannot be served on a CPU with the experts of this base: {reason}. Name the modules to adapt, "
                "and no experts, with --lora-target-modules"
            )
        return UnquantizedMoeBackend.CPU, LoraExperts

    select_backend.without_lora = select  # type: ignore[attr-defined]
    method.select_unquantized_moe_backend = select_backend


def _may_change_experts() -> bool:
    """Return whether the options of the engine that starts allow adapters of experts."""
    lora = get_current_vllm_config().lora_config
    return lora is None or lora.target_modules is None or any("experts" in name for name in lora.target_modules)


class LoraExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """Unquantised experts with LoRA, whose weights stay as they were loaded."""

    @classmethod
    def _supports_grouped_gemm(cls, _: Any) -> tuple[bool, str | None]:
        return True, None  # any width: this is not vLLM's kernel

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(parallel: Any) -> bool:
        return not parallel.use_ep

    def process_weights_after_loading(self, _: Any) -> None:
        """Leave the weights as they are."""

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        *_: Any,
        apply_router_weight_on_input: bool,
        **__: Any,
    ) -> None:
        """Set output (n_rows, d_model) to the sum of the experts' outputs times their router weights (n_rows, top_k).

        w1 is (experts, 2 x d_expert, d_model), gate before up; w2 is (experts, d_model, d_expert).
        """
        if apply_router_weight_on_input:  # the inputs have been multiplied by them
            topk_weights = torch.ones_like(topk_weights)
        context = self._lora_context
        if context is None:  # --lora-target-modules leaves the experts out
            none = torch.zeros(1, dtype=torch.int32)
            empty: list[torch.Tensor] = []
            lora = (empty, empty, empty, empty, none[:0], none, none)
        else:
            wrapper = context.punica_wrapper
            stacked = (
                context.w13_lora_a_stacked, context.w13_lora_b_stacked, context.w2_lora_a_stacked,
                context.w2_lora_b_stacked,
            )  # fmt: skip
            groups = wrapper.tokens
            lora = (*map(list, stacked), groups.rows, groups.starts, wrapper.ranks["experts"])
        lora_experts(output, hidden_states, w1, w2, topk_weights, topk_ids, *lora, activation.value)


@torch.library.impl(ops.library, "lora_experts", "CPU")
def _lora_experts(
    y: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    a13: ops.Tensors,
    b13: ops.Tensors,
    a2: ops.Tensors,
    b2: ops.Tensors,
    rows: torch.Tensor,
    starts: torch.Tensor,
    ranks: torch.Tensor,
    activation: str,
) -> None:
    """Set y to the sum of the experts' outputs; a slot's A are (slots, experts, max_rank, d_in), B likewise.

    A row's sum has the order of the experts' numbers, and is in float32: it does not depend on the other rows.
    """
    slot_of = torch.full((len(x),), -1)
    for slot, mine, _ in ops.groups(rows, starts, ranks, len(x)):
        slot_of[mine] = slot
    total, scale = torch.zeros_like(x, dtype=torch.float32), weights.flatten().float()
    for expert, picks in _picks(ids, len(w13)):
        mine = picks // ids.shape[1]
        slots, inputs = slot_of[mine], x[mine]
        gate_up = F.linear(inputs, w13[expert])
        _add(gate_up, inputs, slots, a13, b13, expert, ranks)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = _BY_NAME[activation](gate) * up
        out = F.linear(inner, w2[expert])
        _add(out, inner, slots, a2, b2, expert, ranks)
        total.index_add_(0, mine, out.float() * scale[picks][:, None])
    y.copy_(total)


def _picks(ids: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each expert that is chosen, and the flat positions in `ids` (n_rows, top_k) at which it is."""
    flat = ids.flatten().long().clamp(0, experts - 1)  # a router that computed NaN may choose anything
    order, start = flat.argsort(stable=True), 0
    for expert, n in enumerate(flat.bincount(minlength=experts).tolist()):
        if n:
            yield expert, order[start : start + n]
        start += n


def _add(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: torch.Tensor,
    a: ops.Tensors,
    b: ops.Tensors,
    expert: int,
    ranks: torch.Tensor,
) -> None:
    """Add B_i A_i x to slice i of y, in place, with the A and B of each row's slot; -1 is a row without an adapter."""
    for slot in torch.unique(slots).tolist():
        rank = int(ranks[slot]) if slot >= 0 else 0
        if not rank:
            continue
        mine, offset = (slots == slot).nonzero().squeeze(1), 0
        for a_i, b_i in zip(a, b, strict=True):
            factor, change = a_i[slot, expert, :rank], b_i[slot, expert, :, :rank]
            part = y[:, offset : offset + len(change)]
            part[mine] = torch.addmm(part[mine].to(change.dtype), x[mine].to(factor.dtype) @ factor.T, change.T).to(
                y.dtype
            )
            offset += len(change)
