"""The modules in the places of PEFT's factors: what they compute, and what others read from them."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.trainer.test_adapter import IDS, load, random_starts
from trainer.adapter import attach
from trainer.config import TrainConfig
from trainer.exact_start import _AdapterOutput


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_b", [True, False])
def test_the_gradients_equal_those_of_autograd(train_b: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    d_a, d_b = torch.randn(3, 12, requires_grad=True), torch.randn(7, 3, requires_grad=train_b)
    a0, b0 = torch.randn(3, 12), torch.randn(7, 3)
    upstream = torch.randn(2, 5, 7)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        inputs = [x, d_a, d_b] if train_b else [x, d_a]
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    reference = 1.5 * (x.float() @ (a0 + d_a).T @ (b0 + d_b).T - x.float() @ a0.T @ b0.T)
    output = _AdapterOutput.apply(x, d_a, d_b, a0, b0, 1.5)
    for ours, expected in zip(gradients(output), gradients(reference), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, **tolerance)


def test_the_gradients_pass_autograds_numeric_check() -> None:
    torch.manual_seed(0)
    x, d_a, d_b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (2, 6), (5, 2)))
    a0, b0 = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: _AdapterOutput.apply(*inputs, a0, b0, 0.7), (x, d_a, d_b))


def test_products_and_gradients_follow_autocast(tiny_base: Path) -> None:
    model = adapted(tiny_base)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in trained)
    expected = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
