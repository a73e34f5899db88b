"""Training rows as `astra-train` tokenises them."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.data import language_examples
from trainer.data.batches import IGNORED


def learned(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt of a row, and those of the whole row."""
    (example,) = language_examples([row], tokenizer, 512, "rows")
    return example["input_ids"][: example["labels"].count(IGNORED)], example["input_ids"]
