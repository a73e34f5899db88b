"""Rows of a JSONL file as token ids and labels.

A row is `{"prompt", "completion"}` (loss on the completion), `{"messages": [...]}` (loss on the last assistant turn)
or `{"text"}` (loss on everything), the forms that TRL and the OpenAI fine-tuning API read.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.errors import DataError

IGNORED = -100  # the label that cross entropy leaves out
_ANSWER = "5d2f0c1e"  # stands for the answer while a chat template is rendered


@dataclass(frozen=True)
class Example:
    """One row: token ids and, of the same length, labels (IGNORED where the loss does not look)."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length; all are (rows, length) int64, the mask is 1 on real tokens."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.mask.to(device), self.labels.to(device))


def data_digest(file: Path) -> str:
    """Return the SHA-256 of the data file as `sha256:...`."""
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def read_examples(file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Read every row of `file`. Raises DataError, which names the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON strings may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {file} cannot be read: {error}") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                examples.append(_example(json.loads(line), tokenizer, max_length))
            except (ValueError, TemplateError) as error:  # JSONDecodeError is a ValueError, too
                raise DataError(f"{file}, line {number}: {str(error).splitlines()[0]}") from error
            except TypeError as error:  # what tokenizers raise then
                raise DataError(f"{file}, line {number}: text with half a surrogate pair is not Unicode") from error
    if not examples:
        raise DataError(f"data file {file} has no rows")
    return examples


def _example(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    match row:
        case {"prompt": str(prompt), "completion": str(completion)} if completion:
            ids = tokenizer(prompt)["input_ids"]
        case {"text": str(completion)} if completion:
            ids = []
        case {"messages": [_, *_] as messages}:
            prompt, completion = _chat(messages, tokenizer)
            # The template has printed every special token itself, and so do servers read it.
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        case _:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                'a row is {"prompt", "completion"}, {"messages"} or {"text"}, each with non-empty text; '
                f"this one has: {found}"
            )
    n_prompt = len(ids)
    if n_prompt >= max_length:
        raise ValueError(f"the prompt alone has {n_prompt} tokens: raise max_length (now {max_length})")
    # Only a text that stands alone begins with a beginning-of-sequence token.
    ids = ids + tokenizer(completion, add_special_tokens=not ids)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Example(ids[:max_length], ([IGNORED] * n_prompt + ids[n_prompt:])[:max_length])


def _chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text that a server would ask with, and the last answer with what the template puts around it."""
    for message in messages:
        match message:
            case {"role": str(), "content": str(content)} if content.strip():
                continue
        raise ValueError('each of "messages" needs "role" and a non-empty "content"')
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(
            '"messages" need a question, and last an answer of the role "assistant": what the model learns'
        )
    if not tokenizer.chat_template:
        raise ValueError('"messages" need a chat template, and this base has none: use "prompt" and "completion"')
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    answered = [*messages[:-1], {**messages[-1], "content": _ANSWER}]  # a template may trim or change a real answer
    before, found, after = tokenizer.apply_chat_template(answered, tokenize=False).rpartition(_ANSWER)
    if not found or not before.startswith(prompt):
        raise ValueError("this base's chat template renders earlier turns differently once an answer follows")
    return prompt, before[len(prompt) :] + messages[-1]["content"] + after.rstrip()


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Pad `examples` on the right to the longest of them."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id)
    labels = torch.full((len(examples), length), IGNORED)
    mask = torch.zeros((len(examples), length), dtype=torch.int64)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids)
        labels[row, :n] = torch.tensor(example.labels)
        mask[row, :n] = 1
    return Batch(ids, mask, labels)


def batches(examples: list[Example], size: int, pad_id: int) -> list[Batch]:
    """Return `examples` in their order, `size` at a time."""
    return [collate(examples[i : i + size], pad_id) for i in range(0, len(examples), size)]


def shuffled_batches(examples: list[Example], size: int, pad_id: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches without end, the rows in a new random order each time they have all been seen."""
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(len(examples), generator=generator).tolist()
        yield collate([examples[i] for i in queue[:size]], pad_id)
        queue = queue[size:]
