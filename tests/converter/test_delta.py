"""The algebra of delta W, compared with float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.adapter_dir import AdapterError, AstraLayer
from converter.delta import delta_weight, lora_factors
from tests.converter.handmade import make_adapter, make_layer, to_lora


def relative_error(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    return float((approximation.double() - exact).norm() / exact.norm())


@settings(deadline=None, max_examples=40)
@given(
    d_out=st.integers(4, 40),
    d_in=st.integers(4, 40),
    rank=st.integers(1, 4),
    move=st.floats(1e-3, 1),
    scaling=st.floats(0.1, 8),
    train_b=st.booleans(),
)
def test_the_product_of_the_factors_is_delta_w(d_out, d_in, rank, move, scaling, train_b) -> None:
    layer = make_layer(d_out, d_in, rank, move, train_b=train_b)
    lora_a, lora_b = lora_factors(layer, scaling)
    k = 2 * rank if train_b else rank
    assert lora_a.shape == (k, d_in)
    assert lora_b.shape == (d_out, k)
    # A - A0 is exact in float32, but A and A0 are rounded: the error is at most float32's epsilon divided by the move.
    assert relative_error(lora_b.double() @ lora_a.double(), delta_weight(layer, scaling)) < 1e-6 / move + 1e-6


@pytest.mark.parametrize("move", [0.03, 0.01, 0.003])
def test_in_bfloat16_the_textbook_form_has_ten_times_our_error(move: float) -> None:
    layer = make_layer(1024, 1024, 16, move)
    exact = delta_weight(layer, 1.0)
    lora_a, lora_b = (t.bfloat16() for t in lora_factors(layer, 1.0))
    ours = relative_error(lora_b.double() @ lora_a.double(), exact)
    textbook_b = torch.cat([layer.b, -layer.b0], dim=1).bfloat16()
    textbook_a = torch.cat([layer.a, layer.a0]).bfloat16()
    textbook = relative_error(textbook_b.double() @ textbook_a.double(), exact)
    assert ours <= 0.005
    assert textbook >= 10 * 0.005
    assert textbook >= 10 * ours


def test_a_trained_b_gives_rank_2r_and_a_frozen_b_rank_r() -> None:
    trained = to_lora(make_adapter({"m": make_layer(32, 24, 4, 0.1)}), torch.float32)
    frozen = to_lora(make_adapter({"m": make_layer(32, 24, 4, 0.1, train_b=False)}), torch.float32)
    assert trained.config["r"] == trained.config["lora_alpha"] == 8
    assert frozen.config["r"] == frozen.config["lora_alpha"] == 4
    assert frozen.layers["m"][0].shape == (4, 24)
    assert torch.linalg.matrix_rank(frozen.layers["m"][1] @ frozen.layers["m"][0]) == 4


def test_an_adapter_with_b0_of_zero_keeps_its_rank() -> None:
    layer = make_layer(16, 24, 4, 0.1)
    lora = to_lora(make_adapter({"m": replace(layer, b0=torch.zeros_like(layer.b0))}), torch.float32)
    assert lora.config["r"] == 4
    a, b = lora.layers["m"]
    assert relative_error(b @ a, delta_weight(replace(layer, b0=torch.zeros_like(layer.b0)), 1.0)) < 1e-6


@pytest.mark.parametrize("small", [make_layer(16, 16, 4, 0.1, train_b=False), make_layer(16, 16, 2, 0.1)])
def test_smaller_layers_are_padded_to_the_largest_rank(small: AstraLayer) -> None:
    lora = to_lora(make_adapter({"a": make_layer(16, 16, 4, 0.1), "b": small}), torch.float32)
    assert {t[0].shape[0] for t in lora.layers.values()} == {t[1].shape[1] for t in lora.layers.values()} == {8}
    assert lora.config["r"] == 8
    a, b = lora.layers["b"]
    assert relative_error(b @ a, delta_weight(small, 1.0)) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaling_is_multiplied_into_the_factors(rslora: bool) -> None:
    adapter = make_adapter({"m": make_layer(16, 24, 4, 0.1)}, alpha=12)
    adapter.config["use_rslora"] = rslora
    assert adapter.scaling == (6.0 if rslora else 3.0)
    lora = to_lora(adapter, torch.float32)
    assert lora.config["use_rslora"] is False
    a, b = lora.layers["m"]
    assert relative_error(b @ a, delta_weight(adapter.layers["m"], adapter.scaling)) < 1e-5


def test_a_factor_that_overflows_the_dtype_is_refused() -> None:
    layer = make_layer(8, 8, 2, 0.1)
    layer.a.mul_(1e6)
    with pytest.raises(AdapterError, match=r"overflows torch\.float16"):
        to_lora(make_adapter({"m": layer}), torch.float16)
