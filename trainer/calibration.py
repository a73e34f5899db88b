"""Gram matrices of the target layers' output activations over real tokens (paper section 3.1: C = Y^T Y / n)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.data import Batch


@dataclass(frozen=True)
class Gram:
    """The uncentred second moment C = Y^T Y / n_tokens (d_out, d_out), float64, of one layer's outputs before bias."""

    matrix: torch.Tensor
    n_tokens: int


def layer_groups(layers: dict[str, nn.Linear], memory: int) -> Iterator[dict[str, nn.Linear]]:
    """Split `layers` so that one group's Gram matrices fit into `memory` bytes; a group has at least one layer."""
    group: dict[str, nn.Linear] = {}
    used = 0
    for name, layer in layers.items():
        size = 8 * layer.weight.shape[0] ** 2
        if group and used + size > memory:
            yield group
            group, used = {}, 0
        group[name] = layer
        used += size
    if group:
        yield group


@torch.no_grad()
def gram_matrices(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    batches: Iterable[Batch],
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Gram]:
    """Run `batches` through `model` and return the Gram matrix of each layer's output.

    Padding is masked out. Products are taken in float64: eigenvalues span many orders of magnitude, and below 1e-7 of
    the largest one a float32 product would leave nothing of the tail but its own round-off.
    """
    sums = {name: torch.zeros(2 * [layer.weight.shape[0]], dtype=torch.float64) for name, layer in layers.items()}
    n_tokens = 0
    real = torch.empty(0)  # which positions of the running batch are no padding

    def add(name: str, layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        bias = getattr(layer, "bias", None)
        y = (output if bias is None else output - bias).flatten(0, -2)[real].double()  # (n_real, d_out)
        sums[name] += (y.T @ y).cpu()

    handles = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            batch = batch.to(model.device)
            real = batch.mask.bool().flatten()
            n_tokens += int(real.sum())
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            on_batch()
    finally:
        for handle in handles:
            handle.remove()
    return {name: Gram(total / n_tokens, n_tokens) for name, total in sums.items()}
