"""The methods: the trainer's settings for each, and experimental initialisations of A0 and B0.

An experimental initialisation is a function of the second moments of a layer and the rank. One that is better than the
existing methods becomes an option of the trainer; the others are kept as a record (benchmarks/README.md, "Experimental
initialisations").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.adapter import Start
from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.evaluate import forgetting_batches

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "pissa": {"method": "pissa"},
    "milora": {"method": "milora"},
    "corda": {"method": "corda"},
    "eva": {"method": "eva"},
    "lora_ga": {"method": "lora_ga"},
    "mica": {"method": "mica"},
    "full": {"method": "full"},
    "tail": {"method": "astra"},
    "principal": {"method": "astra", "subspace": "principal"},
    "middle": {"method": "astra", "subspace": "middle"},
    "random": {"method": "astra", "subspace": "random"},
    "tail_frozen": {"method": "astra", "train_b": False},
}


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer over real tokens, float64: inputs x, outputs y, and gradients g of the loss by y."""

    weight: torch.Tensor  # W (d_out, d_in)
    inputs: torch.Tensor  # E[x x^T], (d_in, d_in)
    outputs: torch.Tensor  # E[y y^T], (d_out, d_out)
    gradients: torch.Tensor  # sum of g g^T, (d_out, d_out)
    own_inputs: Callable[[], torch.Tensor]  # E[x x^T] on text that the base generates; slow at the first call


Tried = Callable[[Moments, int], Start]


def gradient(m: Moments, rank: int) -> Start:
    """B0: the output directions with the largest gradients of the loss; A0 = B0^T W as in Astra."""
    return _astra(m, _top(m.gradients, rank))


def gradient_tail(m: Moments, rank: int) -> Start:
    """B0: the same within the half of the output space with the least energy (in the null space of W, A0 = 0)."""
    low = torch.linalg.eigh(m.outputs).eigenvectors[:, : len(m.outputs) // 2]
    return _astra(m, low @ _top(low.T @ m.gradients @ low, rank))


def whitened_tail(m: Moments, rank: int) -> Start:
    """B0: the tail in the range of W; the rows of A0 are scaled by eigenvalue^-1/2, so that A0 x has unit variance."""
    values, vectors = torch.linalg.eigh(m.outputs)
    first = _zeros(m)
    found = _astra(m, vectors[:, first : first + rank])
    return Start(found.a0 / values[first : first + rank].clamp(min=1e-6 * values.mean()).sqrt()[:, None], found.b0)


def scaled_tail(m: Moments, rank: int) -> Start:
    """B0: the tail in the range of W; A0 is scaled by one number per layer, so that A0 x has a mean variance of 1."""
    first = _zeros(m)
    return _scaled(m, torch.linalg.eigh(m.outputs).eigenvectors[:, first : first + rank])


def scaled_principal(m: Moments, rank: int) -> Start:
    """B0: the principal directions; A0 is scaled by one number per layer, so that A0 x has a mean variance of 1."""
    return _scaled(m, _top(m.outputs, rank))


def balanced_principal(m: Moments, rank: int) -> Start:
    """B0: the principal directions, with equal norms of A0's rows and B0's columns, as in PiSSA."""
    found = _astra(m, _top(m.outputs, rank))
    root = found.a0.norm(dim=1, keepdim=True).sqrt()
    return Start(found.a0 / root, found.b0 * root.T)


def contrast(m: Moments, rank: int) -> Start:
    """A0: input directions of the task's text that the base's own text does not have; B0 = 0."""
    return _contrast(m, rank, ridge=0.01)


def soft_contrast(m: Moments, rank: int) -> Start:
    """Between contrast and inputs: only those directions of the base's own text count that exceed its mean energy."""
    return _contrast(m, rank, ridge=1.0)


def contrast_gradient(m: Moments, rank: int) -> Start:
    """A0 of contrast, B0 of gradient."""
    return Start(contrast(m, rank).a0, _top(m.gradients, rank))


def inputs(m: Moments, rank: int) -> Start:
    """A0: the input directions with the most energy over all real tokens (EVA: centred, only answers); B0 = 0."""
    return _from_zero(m, _top(m.inputs, rank).T)


def inputs_gradient(m: Moments, rank: int) -> Start:
    """A0 of inputs, B0 of gradient."""
    return Start(_top(m.inputs, rank).T, _top(m.gradients, rank))


def inputs_tail(m: Moments, rank: int) -> Start:
    """A0 of inputs; B0: the tail of the outputs, as in Astra (not unique if eigenvalues are zero)."""
    return Start(_top(m.inputs, rank).T, torch.linalg.eigh(m.outputs).eigenvectors[:, :rank])


TRIED: dict[str, Tried] = {
    function.__name__: function
    for function in (
        gradient, gradient_tail, whitened_tail, scaled_tail, scaled_principal, balanced_principal, contrast,
        soft_contrast, contrast_gradient, inputs, inputs_gradient, inputs_tail,
    )
}  # fmt: skip


PROMISING = ("contrast", "soft_contrast")  # also run on other tasks and bases


def settings_of(method: str) -> dict[str, Any]:
    """Return the trainer's settings for a method; experimental ones have Astra's settings and differ in A0 and B0."""
    return METHODS.get(method, {"method": "astra"})


def tried_starts(
    method: str,
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    calibration: list[Batch],
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
) -> dict[str, Start]:
    """Return A0 and B0 of every layer for an experimental method."""
    own = cache(lambda: _measure(model, layers, forgetting_batches(model, tokenizer, config)))
    starts = {}
    for name, (inputs, outputs, gradients) in _measure(model, layers, calibration).items():
        weight = layers[name].weight.detach().double()
        found = TRIED[method](
            Moments(weight, inputs, outputs, gradients, partial(lambda n: own()[n][0], name)), config.rank
        )
        starts[name] = Start(found.a0.float().cpu().contiguous(), found.b0.float().cpu().contiguous())
    return starts


def _measure(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], text: list[Batch]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return E[x x^T] (d_in, d_in), E[y y^T] and the sum of g g^T (d_out, d_out) of every layer, float64."""
    real: torch.Tensor | None = None
    tokens = sum(int(batch["attention_mask"].sum()) for batch in text)

    def zeros(n: int) -> torch.Tensor:
        return torch.zeros(n, n, dtype=torch.float64, device=model.device)

    sums = {
        name: (zeros(layer.in_features), zeros(layer.out_features), zeros(layer.out_features))
        for name, layer in layers.items()
    }

    def add(total: torch.Tensor, values: torch.Tensor) -> None:
        chosen = values.detach().flatten(0, -2)[real].double()
        total += chosen.T @ chosen

    def on_forward(name: str, layer: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        of_inputs, of_outputs, of_gradients = sums[name]
        add(of_inputs, inputs[0])
        add(of_outputs, output if layer.bias is None else output - layer.bias)
        output.register_hook(partial(add, of_gradients))

    handles = [layer.register_forward_hook(partial(on_forward, name)) for name, layer in layers.items()]
    model.enable_input_require_grads()  # without it, nothing in a frozen model would have gradients
    try:
        for batch in ({key: value.to(model.device) for key, value in b.items()} for b in text):
            real = batch["attention_mask"].bool().flatten()
            model(**batch).loss.backward()
    finally:
        model.disable_input_require_grads()
        for handle in handles:
            handle.remove()
    return {name: (x / tokens, y / tokens, g) for name, (x, y, g) in sums.items()}


def _scaled(m: Moments, q: torch.Tensor) -> Start:
    return Start(q.T @ m.weight / (q.T @ m.outputs @ q).diagonal().mean().sqrt(), q)


def _zeros(m: Moments) -> int:
    """Return the number of eigenvalues of the outputs that are zero because W has fewer columns than rows."""
    rows, columns = m.weight.shape
    return max(0, rows - columns)


def _from_zero(m: Moments, a0: torch.Tensor) -> Start:
    return Start(a0, torch.zeros(len(m.weight), len(a0), dtype=a0.dtype))


def _contrast(m: Moments, rank: int, ridge: float) -> Start:
    a0 = _first_of_pair(m.inputs, m.own_inputs(), rank, ridge).T
    return _from_zero(m, a0 / a0.norm(dim=1, keepdim=True))


def _astra(m: Moments, q: torch.Tensor) -> Start:
    return Start(q.T @ m.weight, q)


def _top(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the eigenvectors (d, rank) of the largest eigenvalues."""
    return torch.linalg.eigh(matrix).eigenvectors[:, -rank:]


def _first_of_pair(wanted: torch.Tensor, unwanted: torch.Tensor, rank: int, ridge: float) -> torch.Tensor:
    """Return the vectors v (d, rank) with the largest v^T wanted v / v^T (unwanted + `ridge` x its mean) v."""
    identity = torch.eye(len(unwanted), dtype=unwanted.dtype, device=unwanted.device)
    factor = torch.linalg.cholesky(unwanted + ridge * unwanted.diagonal().mean() * identity)
    half = torch.linalg.solve_triangular(factor, wanted, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return torch.linalg.solve_triangular(factor.T, _top((whitened + whitened.T) / 2, rank), upper=True)
