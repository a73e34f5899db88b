"""The modules in the places of PEFT's factors: what they compute, and what others read from them."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from tests.trainer.test_adapter import IDS, load, random_starts
from trainer.adapter import Start, attach
from trainer.config import TrainConfig
from trainer.exact_start import FactorA, FactorB


def adapted(tiny_base: Path, *, train_b: bool = True, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A model whose adapter was trained: random moves."""
    config = TrainConfig(rank=4, alpha=6, train_b=train_b)
    model = load(tiny_base, dtype)
    started = attach(model, random_starts(model, config), config)
    with torch.no_grad():
        for parameter in started.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return started


@torch.no_grad()
def logits(model: PeftModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("train_b", "rank"), [(True, 8), (False, 4)])
def test_what_peft_saves_is_the_lora_that_the_model_computes(train_b, rank, tiny_base, tmp_path) -> None:
    model = adapted(tiny_base, train_b=train_b)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(tiny_base), tmp_path)
    assert loaded.peft_config["default"].r == rank
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), logits(load(tiny_base)), atol=1e-2)


def test_what_peft_merges_is_the_lora_that_the_model_computes(tiny_base: Path) -> None:
    model = adapted(tiny_base)
    expected, of_base = logits(model), logits(load(tiny_base))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
    with adapted(tiny_base).disable_adapter():
        assert torch.equal(logits(load(tiny_base)), of_base)


@pytest.mark.parametrize("train_b", [True, False])
def test_a_state_dict_restores_the_adapter_to_the_last_bit(train_b, tiny_base) -> None:
    model, other = adapted(tiny_base, train_b=train_b), adapted(tiny_base, train_b=train_b)
    other.load_state_dict(model.state_dict())
    trained = dict(model.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in other.named_parameters())
    assert not any("move" in key or "start" in key for key in model.state_dict())


def test_a_state_dict_of_another_start_is_the_same_change(tiny_base: Path) -> None:
    model, other = adapted(tiny_base), adapted(tiny_base)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("start"):
                parameter.normal_()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_a_factor_of_another_shape_is_refused(tiny_base: Path) -> None:
    model = adapted(tiny_base)
    wrong = {name: value[:2] if "lora_A" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"lora_A.default.weight has shape \(2, 32\), not \(8, 32\)"):
        model.load_state_dict(wrong)


def test_a_copy_has_the_same_output_and_is_not_trained(tiny_base: Path) -> None:
    """TRL's reference model in DPO and GRPO: it copies parameters by their names."""
    model = adapted(tiny_base)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected, trained = logits(model), {name for name, p in model.named_parameters() if p.requires_grad}
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert {name.rpartition(".")[2] for name in trained} == {"move"}


def random_factors(*, train_b: bool, dtype: torch.dtype = torch.float32) -> tuple[FactorA, FactorB]:
    torch.manual_seed(0)
    start = Start(torch.randn(3, 12, dtype=dtype), torch.randn(7, 3, dtype=dtype))
    a, b = FactorA(start.a0, b_is_trained=train_b), FactorB(start.b0, is_trained=train_b)
    with torch.no_grad():
        for parameter in (a.move, *([b.move] if train_b else [])):
            parameter.normal_()
    return a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_b", [True, False])
def test_the_gradients_equal_those_of_the_definition(train_b: bool, dtype: torch.dtype) -> None:
    a, b = random_factors(train_b=train_b)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 5, 7)
    inputs = [x, a.move, *([b.move] if train_b else [])]
    factor_a, factor_b = a.start + a.move, b.start + b.move
    wide = x.float()
    reference = wide @ factor_a.T @ factor_b.T - wide @ a.start.T @ b.start.T
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    output = b(a(x))
    torch.testing.assert_close(output, reference, **tolerance)
    expected = torch.autograd.grad(reference, inputs, upstream)
    for ours, theirs in zip(torch.autograd.grad(output, inputs, upstream), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_the_gradients_pass_autograds_numeric_check() -> None:
    a, b = random_factors(train_b=True, dtype=torch.float64)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def change(x: torch.Tensor, d_a: torch.Tensor, d_b: torch.Tensor) -> torch.Tensor:
        with torch.nn.utils.stateless._reparametrize_module(a, {"move": d_a}):
            inner = a(x)
        return F.linear(inner, torch.cat([d_b, b.start], dim=1))

    assert torch.autograd.gradcheck(change, (x, a.move, b.move))


def test_products_and_gradients_follow_autocast(tiny_base: Path) -> None:
    model = adapted(tiny_base)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in trained)
    expected = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
