"""The Gram matrices: their definition, and the properties of a batch that must not change them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trainer.data import IGNORED, Batch, Example, batches
from trainer.start.calibration import Gram, gram_matrices, layer_groups
from trainer.start.passes import Passes

LAYER = "model.layers.1.mlp.down_proj"  # 32 outputs of 48 inputs
TALL = "model.layers.1.mlp.up_proj"  # 48 outputs of 32 inputs


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def examples(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 200, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture(scope="module")
def pad(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Example], int], list[Batch]]:
    return lambda rows, size: batches(rows, size, tokenizer)


def gram(model: PreTrainedModel, rows: list[Batch], name: str = LAYER) -> torch.Tensor:
    return gram_matrices(Passes(model, rows), {name: model.get_submodule(name)})[name].matrix


def activations(model: PreTrainedModel, rows: list[Example], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and outputs of a layer for all rows, one row at a time, so without padding."""
    inputs, outputs = [], []

    def hook(_module: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor) -> None:
        inputs.append(x[0][0].double())
        outputs.append(y[0].double())

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def test_the_gram_matrix_is_the_second_moment_of_the_outputs(model, pad) -> None:
    rows = examples([7, 3, 12])
    _, y = activations(model, rows, LAYER)
    torch.testing.assert_close(gram(model, pad(rows, 3)), y.T @ y / 22, rtol=1e-5, atol=1e-9)


def test_the_gram_matrix_of_a_tall_layer_is_that_of_its_inputs(model, pad) -> None:
    rows = examples([7, 3, 12])
    layer = model.get_submodule(TALL)
    found = gram_matrices(Passes(model, pad(rows, 2)), {TALL: layer})[TALL]
    x, y = activations(model, rows, TALL)
    assert found.of_inputs
    torch.testing.assert_close(found.matrix, x.T @ x / 22, rtol=1e-4, atol=1e-6)
    w = layer.weight.double()
    torch.testing.assert_close(w @ found.matrix @ w.T, y.T @ y / 22, rtol=1e-4, atol=1e-6)
    assert found.energy == pytest.approx(float(y.square().sum() / 22), rel=1e-5)


def test_answers_only_excludes_the_prompt(model, pad) -> None:
    rows = examples([7, 3])
    for row in rows:
        row["labels"] = [IGNORED, IGNORED, *row["input_ids"][2:]]
    _, y = activations(model, rows, LAYER)
    answers = torch.cat([y[2:7], y[9:10]])
    found = gram_matrices(Passes(model, pad(rows, 2)), {LAYER: model.get_submodule(LAYER)}, answers_only=True)[LAYER]
    assert found.n_tokens == 6
    torch.testing.assert_close(found.matrix, answers.T @ answers / 6, rtol=1e-5, atol=1e-9)


def test_the_stop_is_checked_after_1_2_4_rounds_with_enough_tokens(model, pad) -> None:
    checks: list[int] = []

    def should_stop(grams: Iterator[tuple[str, Gram]]) -> bool:
        checks.append({name: gram.n_tokens for name, gram in grams}[LAYER])
        return len(checks) == 2

    layer = {LAYER: model.get_submodule(LAYER)}
    found = gram_matrices(Passes(model, pad(examples([20] * 16), 1)), layer, should_stop=should_stop)[LAYER]
    assert checks == [40, 80]  # not after 20 tokens: the matrix has 32 rows
    assert found.n_tokens == 80


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9), size=st.integers(1, 9), shuffle=st.randoms())
def test_padding_batch_size_and_order_do_not_change_the_gram_matrix(
    model: PreTrainedModel, pad, lengths: list[int], size: int, shuffle
) -> None:
    rows = examples(lengths)
    reference = gram(model, pad(rows, 1))
    shuffle.shuffle(rows)
    torch.testing.assert_close(gram(model, pad(rows, size)), reference, rtol=1e-4, atol=1e-8)


def test_the_bias_is_subtracted_from_the_outputs(pad) -> None:
    class OneLayer(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            nn.init.constant_(self.layer.bias, 3.0)

        def forward(self, input_ids, attention_mask):  # noqa: ARG002
            return self.layer(nn.functional.one_hot(input_ids, 4).float())

    model = OneLayer()
    rows = [{"input_ids": [0, 1, 2, 3], "labels": [0, 1, 2, 3]}]
    found = gram_matrices(Passes(model, pad(rows, 1)), {"layer": model.layer})["layer"]
    torch.testing.assert_close(
        found.matrix, (model.layer.weight @ model.layer.weight.T).double() / 4, rtol=1e-5, atol=1e-6
    )
    assert found.n_tokens == 4


def test_padding_is_excluded_for_layers_with_flattened_inputs(pad) -> None:
    """Mixture-of-experts models call layers with (rows * length, d)."""

    class Flattening(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, input_ids, attention_mask):  # noqa: ARG002
            return self.layer(nn.functional.one_hot(input_ids.clamp(max=3), 4).float().flatten(0, 1))

    model = Flattening()
    rows = [{"input_ids": [0, 1], "labels": [0, 1]}, {"input_ids": [2, 3, 3], "labels": [2, 3, 3]}]
    found = gram_matrices(Passes(model, pad(rows, 2)), {"layer": model.layer})["layer"]
    w = model.layer.weight.double().T[[0, 1, 2, 3, 3]]
    torch.testing.assert_close(found.matrix, w.T @ w / 5, rtol=1e-5, atol=1e-6)


def test_no_hook_remains_on_the_model(model, pad) -> None:
    gram(model, pad(examples([3]), 1))
    assert not model.get_submodule(LAYER)._forward_hooks


def test_groups_fit_into_the_memory_limit() -> None:
    shapes = {str(i): (10, 12) for i in range(5)}  # 800 bytes each
    assert list(layer_groups(shapes, 1600)) == [["0", "1"], ["2", "3"], ["4"]]
    assert [len(group) for group in layer_groups(shapes, 1)] == [1] * 5
    assert len(list(layer_groups({"tall": (1000, 10), "wide": (10, 1000)}, 1600))) == 1
