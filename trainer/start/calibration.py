"""Gram matrices of the target layers' output activations over real tokens (paper section 3.1: C = Y^T Y / n).

Processes share the batches and add their sums up; every process ends with the same matrices.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from accelerate import PartialState
from torch import distributed, nn

from trainer.data import IGNORED
from trainer.start.passes import Passes


@dataclass(frozen=True)
class Gram:
    """A layer's uncentred second moment, float64, taken on the smaller side of its weight (d_out, d_in).

    C = Y^T Y / n_tokens (d_out, d_out) of the outputs before bias where d_out <= d_in. Otherwise C's rank is d_in at
    most, and the matrix is Cx = X^T X / n_tokens (d_in, d_in) of the inputs, with C = W Cx W^T.
    """

    matrix: torch.Tensor
    n_tokens: int
    energy: float  # trace of C: the mean squared norm of an output
    of_inputs: bool = False


def is_tall(layer: nn.Linear) -> bool:
    """Whether a layer has more outputs than inputs, so that its outputs span only a part of their space."""
    return layer.out_features > layer.in_features  # a quantised weight's own shape is another


def _narrower_side(layer: nn.Linear) -> int:
    return min(layer.out_features, layer.in_features)


def layer_groups(shapes: Mapping[str, tuple[int, int]], memory: int) -> Iterator[list[str]]:
    """Split the layers (name: (d_out, d_in)) so that one group's Gram matrices fit into `memory` bytes.

    A group has at least one layer.
    """
    group: list[str] = []
    used = 0
    for name, shape in shapes.items():
        size = 8 * min(shape) ** 2
        if group and used + size > memory:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


@torch.no_grad()
def gram_matrices(
    passes: Passes,
    layers: Mapping[str, nn.Module],
    *,
    answers_only: bool = False,
    on_batch: Callable[[], None] = lambda: None,
    is_enough: Callable[[Iterator[tuple[str, Gram]]], bool] = lambda _: False,
) -> dict[str, Gram]:
    """Run the batches of `passes` through the model and return the Gram matrix of each of `layers` (linear or adapted).

    Padding is masked out; with `answers_only` also every token that the loss does not look at. After 1, 2, 4, ...
    rounds of batches, once there are as many tokens as the widest matrix has rows, `is_enough` is asked whether to
    stop. Products are taken in float64: eigenvalues span many orders of magnitude, and below 1e-7 of the largest one a
    float32 product would leave nothing of the tail but its own round-off.
    """
    state = PartialState()
    of_inputs = {name: is_tall(_linear(layer)) for name, layer in layers.items()}
    sums = {
        name: torch.zeros(2 * [_narrower_side(_linear(layer))], dtype=torch.float64, device=state.device)
        for name, layer in layers.items()
    }
    norms = {name: torch.zeros((), dtype=torch.float64, device=state.device) for name in layers}
    n_tokens = torch.zeros((), dtype=torch.int64, device=state.device)
    real = torch.empty(0, device=state.device)  # which positions of the running batch count

    def add(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        bias = _linear(layer).bias
        y = (output if bias is None else output - bias).flatten(0, -2)[real]  # (n_real, d_out)
        z = inputs[0].flatten(0, -2)[real].double() if of_inputs[name] else y.double()
        sums[name] += z.T @ z
        norms[name] += y.float().square().sum(dtype=torch.float64)

    handles = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
    rounds = -(-len(passes.batches) // state.num_processes)
    try:
        for number in range(rounds):
            index = number * state.num_processes + state.process_index
            batch = passes.batches[index % len(passes.batches)]
            real = (batch["labels"] != IGNORED if answers_only else batch["attention_mask"].bool()).flatten()
            real = (real & (index < len(passes.batches))).to(state.device)  # every process runs every round: a
            n_tokens += real.sum()  # sharded base needs all of them
            passes.run(index % len(passes.batches), layers.values())
            on_batch()
            seen = int(_over_all_processes(n_tokens))
            widest = max(len(matrix) for matrix in sums.values())
            asked = (number + 1).bit_count() == 1 and number + 1 < rounds and seen >= widest
            if asked and is_enough((name, _gram(sums[name], norms[name], seen, of_inputs[name])) for name in layers):
                break
    finally:
        for handle in handles:
            handle.remove()
    return {name: _gram(sums.pop(name), norms[name], seen, of_inputs[name]) for name in layers}


def _gram(total: torch.Tensor, norms: torch.Tensor, n_tokens: int, of_inputs: bool) -> Gram:
    matrix = _over_all_processes(total) / n_tokens
    return Gram(matrix, n_tokens, float(_over_all_processes(norms) / n_tokens), of_inputs)


def _over_all_processes(tensor: torch.Tensor) -> torch.Tensor:
    if PartialState().num_processes == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def _linear(layer: nn.Module) -> nn.Linear:
    """Return the linear layer inside an adapted one."""
    found = getattr(layer, "base_layer", layer)
    assert isinstance(found, nn.Module)
    return cast(nn.Linear, found)  # or a quantised layer, which looks like one
