"""The learning rate that `learning_rate=auto` chooses, from the gradients before the first step.

Adam's first step moves every trained number by the learning rate, against the sign of its gradient g. To first order
it lowers the loss by

    rate x sum |g|

`auto` chooses the rate for which that is `FIRST_STEP` x sqrt(rank) nats. The first step is then equally large in what
counts, the loss, for every method, scaling, width and base. PiSSA and Astra's principal subspace start from directions
to which the loss is sensitive, and get a low rate; LoRA, whose B is zero, and the tail get a higher one. sum |g| grows
with the rank, the best rates fall with its square root. What was measured is in benchmarks/README.md, "The learning
rate".
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from trainer.config import TrainConfig
from trainer.data import IGNORED, Batch, Example, batches, rejected_example
from trainer.errors import TrainingError

FIRST_STEP = 0.1  # nats, for rank 1: the decrease of the loss by a first step at the peak rate


def first_step(config: TrainConfig) -> float:
    """Return the decrease of the loss (nats) that defines the rate; full fine-tuning has that of the default rank."""
    rank = TrainConfig.model_fields["rank"].default if config.method == "full" else config.rank
    return FIRST_STEP * math.sqrt(rank)


def automatic_rate(model: nn.Module, losses: Iterable[torch.Tensor], config: TrainConfig) -> float:
    """Return first_step / sum |g|, g being the gradients of the sum of `losses` by the trained parameters.

    Each loss is computed when the one before has been used, so that the activations of one row are in memory. The
    model's gradients must be None before, and are None afterwards. Raises TrainingError if the sum is zero or not
    finite.
    """
    was_training = model.training
    model.eval()
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(float(p.grad.abs().sum(dtype=torch.float64)) for p in parameters if p.grad is not None)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    if not 0 < total < math.inf:
        raise TrainingError(f"the sum of the gradients before the first step is {total}: set learning_rate")
    return first_step(config) / total


def losses_of(
    model: nn.Module, sample: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Iterator[torch.Tensor]:
    """Yield the parts of the loss of a step on `sample` at the start, one for each row; they add up to it."""
    device = next(model.parameters()).device
    if config.task == "dpo":
        for row in sample:
            pair = batches([row, rejected_example(row)], 2, tokenizer)[0]
            yield _pair_loss(model, {key: value.to(device) for key, value in pair.items()}, config) / len(sample)
        return
    rows = batches(sample, 1, tokenizer)
    weights = [_targets(row["labels"]) for row in rows]
    for row, weight in zip(rows, weights, strict=True):
        yield model(**{key: value.to(device) for key, value in row.items()}).loss * (weight / sum(weights))


def _pair_loss(model: nn.Module, pair: Batch, config: TrainConfig) -> torch.Tensor:
    """Return a loss of a pair (2, length), chosen and rejected, that has the gradient of its DPO loss at the base.

    There it falls by beta / 2 for each nat by which the difference of their log probabilities rises (`trainer.dpo`).
    """
    logits = model(input_ids=pair["input_ids"], attention_mask=pair["attention_mask"]).logits[:, :-1]
    targets = pair["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none")
    chosen, rejected = losses.sum(dim=1)
    loss: torch.Tensor = config.dpo_beta / 2 * (chosen - rejected)
    return loss


def _targets(labels: torch.Tensor) -> int:
    """Return how many terms the mean loss of a row has: its target tokens, or 1 for a classifier."""
    return 1 if labels.ndim == 1 else max(1, int((labels[:, 1:] != IGNORED).sum()))
