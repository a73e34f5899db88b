"""Examples (token ids and labels), and their padded batches."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens that do not count in the loss
REJECTED = "rejected_ids"  # the key of a preference that holds the ids of the rejected answer

Example = dict[str, Any]  # causal LM: input_ids and labels of equal length; classifier: tokenizer output and one label
Batch = dict[str, torch.Tensor]  # (rows, length) int64, padded on the right; attention_mask is 1 on real tokens


def batches(examples: Sequence[Example], size: int, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Return batches of `size` examples in their order, padded on the right to the longest example of the batch."""
    return [_collate(examples[i : i + size], tokenizer) for i in range(0, len(examples), size)]


def _collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
    tokens = [{key: value for key, value in example.items() if key not in ("labels", REJECTED)} for example in examples]
    batch: Batch = dict(tokenizer.pad(tokens, padding_side="right", return_tensors="pt"))
    labels = [example["labels"] for example in examples]
    if isinstance(labels[0], int):
        return {**batch, "labels": torch.tensor(labels)}
    length = batch["input_ids"].shape[1]
    return {**batch, "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels])}
