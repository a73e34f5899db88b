"""Gram matrices of the target layers' outputs over the real tokens of the calibration rows.

Paper section 3.1: C = Y^T Y / n for the outputs Y (n, d_out) before bias. Padding does not count. Sums are in float64.
Processes share the batches and add up their sums, so that all processes return the same matrices.
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
from trainer.targets import layer_shape


@dataclass(frozen=True)
class Gram:
    """The uncentred second moment of a layer with weight W (d_out, d_in), float64, on its smaller side.

    For d_out <= d_in the matrix is C = Y^T Y / n_tokens (d_out, d_out) of the outputs before bias. Otherwise it is
    Cx = X^T X / n_tokens (d_in, d_in) of the inputs: C = W Cx W^T then has rank d_in at most.
    """

    matrix: torch.Tensor
    n_tokens: int
    energy: float  # trace of C: the mean squared norm of an output
    of_inputs: bool = False


def is_tall(layer: nn.Linear) -> bool:
    """Return whether a layer has more outputs than inputs; its outputs then span only a part of their space."""
    d_out, d_in = layer_shape(layer)
    return d_out > d_in


def _smaller_side(layer: nn.Linear) -> int:
    return min(layer_shape(layer))


def layer_groups(shapes: Mapping[str, tuple[int, int]], memory: int) -> Iterator[list[str]]:
    """Yield groups of layer names (`shapes`: name to (d_out, d_in)) whose Gram matrices fit into `memory` bytes.

    Each group has at least one layer, whatever its size.
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
    should_stop: Callable[[Iterator[tuple[str, Gram]]], bool] = lambda _: False,
) -> dict[str, Gram]:
    """Run the batches of `passes` through the model; return the Gram matrix of each of `layers` (linear or adapted).

    Padding is excluded, and with `answers_only` also all tokens that do not count in the loss. A round is one batch per
    process. After 1, 2, 4, ... rounds, once there are at least as many tokens as rows in the widest matrix,
    `should_stop` decides whether calibration ends. Products are in float64: eigenvalues span many orders of magnitude,
    and in float32 those below 1e-7 of the largest would be round-off.
    """
    state = PartialState()
    of_inputs = {name: is_tall(_linear(layer)) for name, layer in layers.items()}
    sums = {
        name: torch.zeros(2 * [_smaller_side(_linear(layer))], dtype=torch.float64, device=state.device)
        for name, layer in layers.items()
    }
    norms = {name: torch.zeros((), dtype=torch.float64, device=state.device) for name in layers}
    n_tokens = torch.zeros((), dtype=torch.int64, device=state.device)
    real = torch.empty(0, device=state.device)  # bool (rows * length): positions of the current batch that count
    grid = real.shape  # (rows, length) of the current batch

    def add(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.shape[:-1] not in (grid, (grid.numel(),)):  # DeBERTa's layers also compute on relative positions
            return
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
            grid = batch["attention_mask"].shape
            # A sharded base needs all processes in each round: without a batch of its own, a process counts no token.
            real = (real & (index < len(passes.batches))).to(state.device)
            n_tokens += real.sum()
            passes.run(index % len(passes.batches), layers.values())
            on_batch()
            seen = int(_sum_over_processes(n_tokens))
            widest = max(len(matrix) for matrix in sums.values())
            is_check = (number + 1).bit_count() == 1 and number + 1 < rounds and seen >= widest
            if is_check and should_stop(
                (name, _gram(sums[name], norms[name], seen, of_inputs[name])) for name in layers
            ):
                break
    finally:
        for handle in handles:
            handle.remove()
    return {name: _gram(sums.pop(name), norms[name], seen, of_inputs[name]) for name in layers}


def _gram(total: torch.Tensor, norms: torch.Tensor, n_tokens: int, of_inputs: bool) -> Gram:
    matrix = _sum_over_processes(total) / n_tokens
    return Gram(matrix, n_tokens, float(_sum_over_processes(norms) / n_tokens), of_inputs)


def _sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    if PartialState().num_processes == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def _linear(layer: nn.Module) -> nn.Linear:
    """Return the linear layer inside an adapted layer; a linear layer itself."""
    found = getattr(layer, "base_layer", layer)
    assert isinstance(found, nn.Module)
    return cast(nn.Linear, found)  # a quantised layer has the same attributes
