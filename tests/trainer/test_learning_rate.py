"""The automatic learning rate: the first step lowers the loss by the same amount for every method, rank and scaling."""

import math

import pytest
import torch
from rich.progress import Progress

from trainer.adapter import attach, target_layers
from trainer.base import load_base, load_tokenizer
from trainer.config import TrainConfig
from trainer.data import batches, language_examples
from trainer.errors import TrainingError
from trainer.learning_rate import automatic_rate, first_step, losses_of
from trainer.start.initialise import calibration_batches, initialise


def started(base, rows, **settings):
    """Return a model with the start of a method, the parts of its loss on 16 rows, the rows, and the settings."""
    config = TrainConfig(calibration_rows=8, max_length=32, **settings)
    tokenizer = load_tokenizer(base, config)
    examples = language_examples(rows[:16], tokenizer, config.max_length, "rows")
    torch.manual_seed(0)
    model = load_base(base, config)
    layers = target_layers(model, config)
    calibration = calibration_batches(examples, tokenizer, config)
    starts = initialise(model, layers, calibration, config, "", Progress(disable=True)).starts
    model = attach(model, starts, config)
    return model, losses_of(model, examples, tokenizer, config), batches(examples, 16, tokenizer)[0], config


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora", "rank": 4},
        {"method": "lora", "rank": 4, "alpha": 16},
        {"method": "pissa", "rank": 4},
        {"method": "astra", "rank": 2},
        {"method": "astra", "rank": 8},
        {"method": "astra", "rank": 4, "train_b": False},
        {"method": "astra", "rank": 4, "subspace": "principal"},
    ],
    ids=str,
)
def test_a_hundredth_of_adams_first_step_lowers_the_loss_by_a_hundredth_of_the_chosen_amount(
    tiny_base, rows, settings
) -> None:
    model, losses, whole, config = started(tiny_base, rows, **settings)
    rate = automatic_rate(model, losses, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate / 100, eps=1e-30, weight_decay=0)
    before = model(**whole).loss
    before.backward()
    optimizer.step()
    assert float((before - model(**whole).loss).detach()) == pytest.approx(first_step(config) / 100, rel=0.2)


def test_the_rate_leaves_the_model_as_it_was(tiny_base, rows) -> None:
    model, losses, _, config = started(tiny_base, rows, method="lora", rank=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    automatic_rate(model.train(), losses, config)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_gradients_that_give_no_rate_are_one_line(tiny_base, rows) -> None:
    model, losses, _, config = started(tiny_base, rows, method="lora", rank=4)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="set learning_rate"):
        automatic_rate(model, losses, config)
