"""The model with a LoRA of single experts, for comparisons: transformers stacks a layer's experts in two tensors."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from converter.adapter_dir.base_names import ExpertPart
from converter.source import Factors

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# (parameter of the module, expert) -> the layers of the expert that are parts of it: module and number of the part
Parts = Mapping[tuple[str, int], list[tuple[str, int]]]


@contextmanager
def adapted_experts(
    model: nn.Module,
    layers: Mapping[str, Factors],
    places: Mapping[str, ExpertPart],
    scaling: Callable[[str, int], float],
) -> Iterator[None]:
    """Let the stacked experts of `model` compute with the LoRA `layers` that have `places`."""
    parts: dict[str, dict[tuple[str, int], list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
    for module, place in places.items():
        stacked, _, parameter = place.parameter.rpartition(".")
        parts[stacked][parameter, place.expert].append((module, place.part))
    changed = {name: model.get_submodule(name) for name in parts}
    for name, experts in changed.items():
        experts.forward = partial(_forward, experts, parts[name], layers, scaling)
    try:
        yield
    finally:
        for experts in changed.values():
            del experts.forward


def _forward(
    experts: Any,
    parts: Parts,
    layers: Mapping[str, Factors],
    scaling: Callable[[str, int], float],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Return the sum (n_tokens, d_model) of the chosen experts' outputs times their weights (n_tokens, top_k)."""
    total = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        tokens, choice = (top_k_index == expert).nonzero(as_tuple=True)

        def layer(name: str, x: torch.Tensor, expert: int = expert) -> torch.Tensor:
            y = F.linear(x, getattr(experts, name)[expert])
            n_parts = 2 if name == GATE_UP else 1
            for module, part in parts.get((name, expert), ()):
                lora_a, lora_b = layers[module]
                change = scaling(module, len(lora_a)) * (x.to(lora_a.dtype) @ lora_a.T @ lora_b.T)
                y.chunk(n_parts, dim=-1)[part].add_(change)
            return y

        gate, up = layer(GATE_UP, hidden_states[tokens]).chunk(2, dim=-1)
        out = layer(DOWN, experts.act_fn(gate) * up)
        total.index_add_(0, tokens, (out * top_k_weights[tokens, choice, None]).to(total.dtype))
    return total
