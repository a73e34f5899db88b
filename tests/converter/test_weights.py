"""Weights with which an engine cannot compute are refused, and the estimate of what they change is an upper bound."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import adapter_dir
from converter.adapter_dir import LoraAdapter, MalformedAdapter, weights


def write(folder: Path, a: torch.Tensor, b: torch.Tensor, **config: object) -> Path:
    lora = LoraAdapter({"m.q_proj": (a, b)}, {"r": len(a), "lora_alpha": len(a), **config}, {})
    with adapter_dir.new_folder(folder) as partial:
        adapter_dir.save_lora(partial, lora)
    return folder


@pytest.mark.parametrize(
    ("a", "b", "alpha", "message"),
    [
        (float("nan"), 0.1, 4, "contains NaN or infinite values"),
        (0.1, -float("inf"), 4, "contains NaN or infinite values"),
        (1e30, 0.0, 4, "has weights of 1.0e+30, allowed are 65504"),
        (0.0, -1e30, 4, "has weights of 1.0e+30"),
        (1e-9, 1.0, 1e6, "has weights of 2.5e+05"),  # alpha / r is part of B in an engine
        (100.0, 100.0, 4, "may change a weight of the base by 4.0e+04, allowed are 10000: answers would overflow"),
    ],
)
def test_weights_with_which_an_engine_cannot_compute_are_refused_in_one_line(
    a: float, b: float, alpha: float, message: str, tmp_path: Path
) -> None:
    lora = write(tmp_path / "lora", torch.full((4, 6), a), torch.full((5, 4), b), lora_alpha=alpha)
    with pytest.raises(MalformedAdapter) as refused:
        adapter_dir.check_weights(lora, adapter_dir.load_lora(lora))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@settings(max_examples=50, deadline=None)
@given(
    rank=st.integers(1, 4),
    scale=st.floats(0.1, 300.0),
    alpha=st.floats(0.5, 64.0),
    use_rslora=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_an_adapter_that_is_admitted_changes_no_weight_by_more_than_the_limit(
    rank: int, scale: float, alpha: float, use_rslora: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * scale for shape in ((rank, 6), (5, rank)))
    change = (b.double() @ a.double()).abs().max() * alpha / (rank**0.5 if use_rslora else rank)
    with TemporaryDirectory() as folder:
        lora = write(Path(folder) / "lora", a, b, lora_alpha=alpha, use_rslora=use_rslora)
        try:
            adapter_dir.check_weights(lora, adapter_dir.load_lora(lora))
        except MalformedAdapter:
            assert change > weights.LARGEST_CHANGE / 100  # the estimate is not far from it
        else:
            assert change <= weights.LARGEST_CHANGE
