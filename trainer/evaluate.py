"""Evaluation of a trained model: forgetting, and exact match of greedy answers.

Forgetting is the loss on text of the base's own distribution after training minus the loss before. The text is the
user's (`forgetting_data`), or is sampled from the base.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import TrainConfig
from trainer.data import IGNORED, Batch, Example, batches, language_examples, read_rows
from trainer.limits import check_rows, max_positions

_LENGTH = 128  # maximum tokens per row of forgetting text
_MASK_SHARE = 0.15  # share of the tokens that are masked for an encoder
_FILL_ROUNDS = 16  # rounds in which an encoder fills a row of masks


@dataclass(frozen=True)
class Forgetting:
    """The loss on `text`, a file or "written by the base", before and after training, nats per token."""

    text: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """Return after - before, nats per token; on text sampled from the base it estimates KL(base || trained)."""
        return self.after - self.before


def forgetting_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> list[Batch]:
    """Return the text for the measurement of forgetting: the user's, or a sample of the base at temperature 1.

    For an encoder 15 % of the tokens, chosen with a fixed seed, are masked, and only these have labels. Raises
    DataError.
    """
    is_encoder, source = type(model).__name__.endswith("ForMaskedLM"), config.forgetting_data
    if source is None and not is_encoder:
        return _sample_from_decoder(model, tokenizer, config.forgetting_rows)
    if source is None:
        texts = _sample_from_encoder(model, tokenizer, config.forgetting_rows)
        return batches(_with_masks(texts, tokenizer), 16, tokenizer)
    rows, length = read_rows(source)[: config.forgetting_rows], _length(model)
    if is_encoder:
        texts = [tokenizer(row["text"], truncation=True, max_length=length)["input_ids"] for row in rows]
        examples = _with_masks(texts, tokenizer)
    else:
        examples = language_examples(rows, tokenizer, length, source)
    check_rows(examples, source, model, tokenizer, config)
    return batches(examples, 16, tokenizer)


@torch.no_grad()
def _sample_from_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[Batch]:
    first = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    start = torch.full((rows, 1), first, device=model.device)
    ids = model.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=_length(model) - 1,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    ends = torch.isin(ids[:, 1:], torch.tensor(_end_tokens(model, tokenizer), device=ids.device)).long()
    # An end token is text, tokens after it are padding.
    mask = torch.cat([torch.ones_like(start), (ends.cumsum(1) - ends == 0).long()], 1)
    labels = ids.masked_fill(mask == 0, IGNORED)
    keys = ("input_ids", "attention_mask", "labels")
    return [
        dict(zip(keys, part, strict=True)) for part in zip(*(t.split(16) for t in (ids, mask, labels)), strict=True)
    ]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which `model` stops to write: those of its generation config, and the tokenizer's."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    listed = found if isinstance(found, list) else [found]
    return [token for token in {*listed, tokenizer.eos_token_id} if token is not None]


def _length(model: PreTrainedModel) -> int:
    return min(_LENGTH, max_positions(model) or _LENGTH)


@torch.no_grad()
def _sample_from_encoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[list[int]]:
    """Return rows of masks that an encoder has filled: a sixteenth of the positions per round, in random order."""
    length = _length(model)
    empty = tokenizer(length * str(tokenizer.mask_token), truncation=True, max_length=length)["input_ids"]
    ids = torch.tensor(rows * [empty], device=model.device)
    positions = (ids[0] == tokenizer.mask_token_id).nonzero().flatten()
    for chosen in positions[torch.randperm(len(positions), device=positions.device)].chunk(_FILL_ROUNDS):
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
        masked = (torch.rand(len(ids), generator=generator) < _MASK_SHARE) & ~special
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
        targets = int((batch["labels"][:, 1:] != IGNORED).sum())  # the first token is no target of a causal LM
        total += float(model(**batch).loss) * targets
        n += targets
    model.train(was_training)
    return total / max(1, n)


@torch.no_grad()
def answers_match(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return (rows,) bool: whether the greedy answer of a row equals its labels.

    The two are equal if and only if every label is the likeliest token after the labels before it. So one forward pass
    is enough, without generation.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    matches: torch.Tensor = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(dim=1)
    return matches


def _on_device(model: torch.nn.Module, text: Iterable[Batch]) -> Iterable[Batch]:
    device = next(model.parameters()).device
    return ({key: value.to(device) for key, value in batch.items()} for batch in text)
