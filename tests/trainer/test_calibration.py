"""Gram matrices: what is measured, and what must not change it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.calibration import gram_matrices, layer_groups
from trainer.data import Example, batches

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def examples(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 200, (n,), generator=generator).tolist() for n in lengths]
    return [Example(row, row) for row in ids]


def gram(model: PreTrainedModel, rows: list[Example], batch_size: int) -> torch.Tensor:
    layer = {LAYER: model.get_submodule(LAYER)}
    return gram_matrices(model, layer, batches(rows, batch_size, pad_id=0))[LAYER].matrix


def test_gram_matrix_is_the_second_moment_of_the_outputs_of_real_tokens(model: PreTrainedModel) -> None:
    rows = examples([7, 3, 12])
    outputs = []
    handle = model.get_submodule(LAYER).register_forward_hook(lambda _m, _i, y: outputs.append(y[0].double()))
    with torch.no_grad():
        for row in rows:  # one at a time: no padding at all
            model(input_ids=torch.tensor([row.ids]))
    handle.remove()
    y = torch.cat(outputs)
    torch.testing.assert_close(gram(model, rows, batch_size=3), y.T @ y / 22, rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9), size=st.integers(1, 9), shuffle=st.randoms())
def test_padding_batch_size_and_order_do_not_change_the_gram_matrix(
    model: PreTrainedModel, lengths: list[int], size: int, shuffle
) -> None:
    rows = examples(lengths)
    reference = gram(model, rows, batch_size=1)
    shuffle.shuffle(rows)
    torch.testing.assert_close(gram(model, rows, batch_size=size), reference, rtol=1e-4, atol=1e-8)


def test_the_layers_bias_is_left_out() -> None:
    class OneLayer(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            nn.init.constant_(self.layer.bias, 3.0)

        def forward(self, input_ids, attention_mask, use_cache):  # noqa: ARG002
            return self.layer(nn.functional.one_hot(input_ids, 4).float())

    model = OneLayer()
    found = gram_matrices(model, {"layer": model.layer}, batches([Example([0, 1, 2, 3], [0, 1, 2, 3])], 1, 0))["layer"]
    torch.testing.assert_close(
        found.matrix, (model.layer.weight @ model.layer.weight.T).double() / 4, rtol=1e-5, atol=1e-6
    )
    assert found.n_tokens == 4


def test_a_layer_that_sees_its_rows_flattened_is_masked_alike() -> None:
    """Mixture-of-experts models call layers with (rows * length, d); the mask must follow."""

    class Flattening(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, input_ids, attention_mask, use_cache):  # noqa: ARG002
            return self.layer(nn.functional.one_hot(input_ids, 4).float().flatten(0, 1))

    model = Flattening()
    rows = [Example([0, 1], [0, 1]), Example([2, 3, 3], [2, 3, 3])]
    found = gram_matrices(model, {"layer": model.layer}, batches(rows, 2, 0))["layer"]
    w = model.layer.weight.double().T[[0, 1, 2, 3, 3]]
    torch.testing.assert_close(found.matrix, w.T @ w / 5, rtol=1e-5, atol=1e-6)


def test_no_hook_stays_on_the_model(model: PreTrainedModel) -> None:
    gram(model, examples([3]), 1)
    assert not model.get_submodule(LAYER)._forward_hooks


def test_groups_hold_no_more_than_the_memory_allows_and_every_layer_once() -> None:
    layers = {str(i): nn.Linear(2, 10) for i in range(5)}  # 800 bytes each
    assert [list(group) for group in layer_groups(layers, 1600)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [len(group) for group in layer_groups(layers, 1)] == [1] * 5
