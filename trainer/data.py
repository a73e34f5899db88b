"""Rows of a data set as token ids and labels.

A causal LM's row is `{"prompt", "completion"}` (loss on the completion), `{"messages": [...]}` (loss on the last
assistant turn), the same two turns as lists of messages, or `{"text"}` (loss on everything): the forms that TRL and the
OpenAI fine-tuning API read. A classifier's is `{"text", "label"}`, with `"text_pair"` where there are two texts.

TRL could tokenise, too. It does so with prompt and completion as one text, where a token may reach across the boundary,
and then trains on another context than a server sees. Here the prompt is always tokenised by itself, as a server does.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from converter.errors import first_line
from trainer.errors import DataError

IGNORED = -100  # the label that cross entropy leaves out
_ANSWER = "5d2f0c1e"  # stands for the answer while a chat template is rendered

Row = dict[str, Any]
Example = dict[str, Any]  # input_ids and labels of one length (causal LM), or what the tokenizer gives and one label
Batch = dict[str, torch.Tensor]  # (rows, length) int64, padded on the right; attention_mask is 1 on real tokens


def read_rows(source: str, split: str = "train", columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return the rows of a local json, jsonl, parquet or csv file, or of a hub data set's `split`.

    `columns` maps the names above to the source's own. Raises DataError.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and (path.exists() or source.count("/") != 1):
        rows = list(_json_rows(path))
    else:
        rows = _library_rows(source, split)
    for ours, theirs in (columns or {}).items():
        for row in rows:
            if theirs not in row:
                raise DataError(f"{source} has no column {theirs!r} for {ours!r}; there are: {', '.join(row)}")
            row[ours] = row.pop(theirs)
    if not rows:
        raise DataError(f"data file {source} has no rows")
    return rows


def _json_rows(path: Path) -> Iterator[Row]:
    """Read JSON as it is: the `datasets` library would give every row the columns of all, and one type per column."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read: {error}") from error
    documents = [text] if path.suffix == ".json" else text.split("\n")  # JSON strings may hold U+2028: no splitlines()
    for number, document in enumerate(documents, 1):
        if document.strip():
            try:
                found = json.loads(document)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {first_line(error)}") from error
            for row in found if path.suffix == ".json" and isinstance(found, list) else [found]:
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: a row is a JSON object, not {type(row).__name__}")
                yield row


def _library_rows(source: str, split: str) -> list[Row]:
    from datasets import load_dataset  # a second of imports that JSON does not need
    from datasets.exceptions import DatasetsError

    kind = Path(source).suffix.removeprefix(".")
    try:
        if kind in ("parquet", "csv") and Path(source).exists():
            found = load_dataset(kind, data_files=source, split="train")
        else:
            found = load_dataset(source, split=split)
        return [{key: value for key, value in row.items() if value is not None} for row in found]
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{source} is no readable json, jsonl, parquet or csv file, nor a hub data set: {first_line(error)}"
        ) from error


def digest(rows: Iterable[Any]) -> str:
    """Return the SHA-256 of rows (anything JSON), in their order, as `sha256:...`."""
    found = hashlib.sha256()
    for row in rows:
        found.update(
            json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        )
    return f"sha256:{found.hexdigest()}"


def language_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str
) -> list[Example]:
    """Return input_ids and labels (IGNORED on the prompt) of every row. Raises DataError, which names the row."""
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            examples.append(_language_example(row, tokenizer, max_length))
        except (ValueError, TemplateError) as error:
            raise DataError(f"{source}, row {number}: {first_line(error)}") from error
        except TypeError as error:  # what tokenizers raise then
            raise DataError(f"{source}, row {number}: text with half a surrogate pair is not Unicode") from error
    return examples


def classification_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str, names: Sequence[str]
) -> list[Example]:
    """Return the tokens of every row and its label's place in `names`. Raises DataError, which names the row."""
    examples = []
    for number, row in enumerate(rows, 1):
        match row:
            case {"text": str(text), "label": str() | int() as label} if text and str(label) in names:
                pair = row.get("text_pair")
                tokens = tokenizer(text, pair, truncation=True, max_length=max_length)
                examples.append({**tokens, "labels": names.index(str(label))})
            case _:
                raise DataError(
                    f'{source}, row {number}: a row is {{"text", "label"}} with a label out of {", ".join(names)}; '
                    f"this one has: {', '.join(row)}, label {row.get('label')!r}"
                )
    return examples


def label_names(rows: Iterable[Row]) -> list[str]:
    """Return the labels that occur, as text: numbers in their order, words alphabetically."""
    found = {row.get("label") for row in rows} - {None}
    return [str(label) for label in sorted(found, key=lambda label: (isinstance(label, str), label))]


def _language_example(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    match row:
        case {"prompt": str(prompt), "completion": str(completion)} if completion:
            ids = tokenizer(prompt)["input_ids"]
        case {"text": str(completion)} if completion:
            ids = []
        case {"messages": [_, *_] as messages} | {"prompt": [_, *_] as messages, "completion": list()}:
            prompt, completion = _chat([*messages, *row.get("completion", [])], tokenizer)
            # The template has printed every special token itself, and so do servers read it.
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        case _:
            raise ValueError(
                'a row is {"prompt", "completion"}, {"messages"} or {"text"}, each with non-empty text; '
                f"this one has: {', '.join(row)}"
            )
    n_prompt = len(ids)
    if n_prompt >= max_length:
        raise ValueError(f"the prompt alone has {n_prompt} tokens: raise max_length (now {max_length})")
    # Only a text that stands alone begins with a beginning-of-sequence token.
    ids = ids + tokenizer(completion, add_special_tokens=not ids)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return {"input_ids": ids[:max_length], "labels": ([IGNORED] * n_prompt + ids[n_prompt:])[:max_length]}


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


def batches(examples: Sequence[Example], size: int, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Return `examples` in their order, `size` at a time, padded on the right to the longest of each batch."""
    return [_collate(examples[i : i + size], tokenizer) for i in range(0, len(examples), size)]


def _collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
    tokens = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
    batch: Batch = dict(tokenizer.pad(tokens, padding_side="right", return_tensors="pt"))
    labels = [example["labels"] for example in examples]
    if isinstance(labels[0], int):
        return {**batch, "labels": torch.tensor(labels)}
    length = batch["input_ids"].shape[1]
    return {**batch, "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels])}
