"""What a run did to the model: forgetting, and exact match of its answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import TrainConfig
from trainer.data import IGNORED, Batch, Example, batches, language_examples, read_rows

_LENGTH = 128  # tokens of a row of text on which forgetting is measured
_MASKED = 0.15  # of them, in front of an encoder
_TURNS = 16  # in which an encoder writes a row


@dataclass(frozen=True)
class Forgetting:
    """Loss on text of the base's own distribution, nats per token, before and after training."""

    text: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """Return what the adapter cost; on text that the base wrote itself this estimates KL(base || trained)."""
        return self.after - self.before


def forgetting_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> list[Batch]:
    """Return held-out text of the base's own distribution: the user's, or what the base writes at temperature 1.

    An encoder's has a seeded 15 % of its tokens masked, and labels for these.
    """
    if type(model).__name__.endswith("ForMaskedLM"):
        texts = (
            _filled_in_by(model, tokenizer, config.forgetting_rows)
            if config.forgetting_data is None
            else [
                tokenizer(row["text"], truncation=True, max_length=_LENGTH)["input_ids"]
                for row in read_rows(config.forgetting_data)[: config.forgetting_rows]
            ]
        )
        return batches(_with_masks(texts, tokenizer), 16, tokenizer)
    if config.forgetting_data is not None:
        rows = read_rows(config.forgetting_data)[: config.forgetting_rows]
        return batches(language_examples(rows, tokenizer, _LENGTH, config.forgetting_data), 16, tokenizer)
    return _written_by(model, tokenizer, config.forgetting_rows)


@torch.no_grad()
def _written_by(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[Batch]:
    first = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    start = torch.full((rows, 1), first, device=model.device)
    ids = model.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=_LENGTH - 1,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    ended = (ids[:, 1:] == tokenizer.eos_token_id).cumsum(1)  # the end itself was written, what follows is padding
    mask = torch.cat([torch.ones_like(start), (ended - (ids[:, 1:] == tokenizer.eos_token_id).long() == 0).long()], 1)
    labels = ids.masked_fill(mask == 0, IGNORED)
    keys = ("input_ids", "attention_mask", "labels")
    return [
        dict(zip(keys, part, strict=True)) for part in zip(*(t.split(16) for t in (ids, mask, labels)), strict=True)
    ]


@torch.no_grad()
def _filled_in_by(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[list[int]]:
    """Return what an encoder writes into rows of masks: a sixteenth of the places in each turn, in random order."""
    empty = tokenizer(_LENGTH * str(tokenizer.mask_token), truncation=True, max_length=_LENGTH)["input_ids"]
    ids = torch.tensor(rows * [empty], device=model.device)
    places = (ids[0] == tokenizer.mask_token_id).nonzero().flatten()
    for chosen in places[torch.randperm(len(places), device=places.device)].chunk(_TURNS):
        probabilities = model(input_ids=ids).logits[:, chosen].float().softmax(-1)
        ids[:, chosen] = torch.multinomial(probabilities.flatten(0, 1), 1).view(rows, len(chosen))
    written: list[list[int]] = ids.tolist()
    return written


def _with_masks(texts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row in texts:
        ids = torch.tensor(row)
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        masked = (torch.rand(len(ids), generator=generator) < _MASKED) & ~special
        labels = ids.masked_fill(~masked, IGNORED)
        examples.append(
            {"input_ids": ids.masked_fill(masked, tokenizer.mask_token_id).tolist(), "labels": labels.tolist()}
        )
    return examples


@torch.no_grad()
def language_loss(model: torch.nn.Module, text: Sequence[Batch]) -> float:
    """Return the mean loss of `model` over all target tokens of `text`, nats per token."""
    was_training = model.training
    model.eval()
    total, n = 0.0, 0
    for batch in _on_device(model, text):
        targets = int((batch["labels"][:, 1:] != IGNORED).sum())  # a causal LM has none for the first token
        total += float(model(**batch).loss) * targets
        n += targets
    model.train(was_training)
    return total / max(1, n)


@torch.no_grad()
def answers_match(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return for each row whether the greedy answer is the labels' (rows,) bool.

    The greedy answer is the labels exactly where every label is the likeliest token after the labels before it: one
    forward pass tells, without generating.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    matches: torch.Tensor = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(dim=1)
    return matches


def _on_device(model: torch.nn.Module, text: Iterable[Batch]) -> Iterable[Batch]:
    device = next(model.parameters()).device
    return ({key: value.to(device) for key, value in batch.items()} for batch in text)
