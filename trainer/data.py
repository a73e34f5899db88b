"""Reading of data sets, and conversion of their rows into token ids and labels.

Rows of a causal language model (the formats of TRL and of the OpenAI fine-tuning API):
    {"prompt", "completion"}     the loss is on the completion; both may also be lists of messages
    {"messages": [...]}          a chat; the loss is on the last assistant turn
    {"text"}                     the loss is on every token
Rows of a classifier: {"text", "label"}, with {"text_pair"} for the second of two texts.

TRL tokenises prompt and completion as one text. A token may then span their boundary, and training sees another prompt
than a server does. Here the prompt is tokenised by itself, as a server does.
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

IGNORED = -100  # label of tokens that do not count in the loss
_PLACEHOLDER = "5d2f0c1e"  # replaces the answer while the chat template is rendered

Row = dict[str, Any]
Example = dict[str, Any]  # causal LM: input_ids and labels of equal length; classifier: tokenizer output and one label
Batch = dict[str, torch.Tensor]  # (rows, length) int64, padded on the right; attention_mask is 1 on real tokens


def read_rows(source: str, split: str = "train", columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return the rows of a local json, jsonl, parquet or csv file, or of the `split` of a hub data set.

    `columns` maps the column names of this module to those of the source. Raises DataError.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and (path.exists() or source.count("/") != 1):
        rows = list(_json_rows(path))
    else:
        rows = _library_rows(source, split)
    for ours, theirs in (columns or {}).items():
        for row in rows:
            if theirs not in row:
                raise DataError(f"{source} has no column {theirs!r} for {ours!r}; available: {', '.join(row)}")
            row[ours] = row.pop(theirs)
    if not rows:
        raise DataError(f"data file {source} has no rows")
    return rows


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON file unchanged: `datasets` would force the same columns and types on all rows."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read: {error}") from error
    documents = [text] if path.suffix == ".json" else text.split("\n")  # not splitlines(): JSON strings may hold U+2028
    for number, document in enumerate(documents, 1):
        if document.strip():
            try:
                found = json.loads(document)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {first_line(error)}") from error
            for row in found if path.suffix == ".json" and isinstance(found, list) else [found]:
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: a row must be a JSON object, not {type(row).__name__}")
                yield row


def _library_rows(source: str, split: str) -> list[Row]:
    from datasets import load_dataset  # its import takes a second, and JSON does not need it
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
            f"{source} is neither a readable json, jsonl, parquet or csv file nor a hub data set: {first_line(error)}"
        ) from error


def digest(rows: Iterable[Any]) -> str:
    """Return the SHA-256 of rows (JSON values) in their order, as `sha256:...`."""
    found = hashlib.sha256()
    for row in rows:
        found.update(
            json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        )
    return f"sha256:{found.hexdigest()}"


def language_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str
) -> list[Example]:
    """Return input_ids and labels (IGNORED on the prompt) of each row. Raises DataError with the row's number."""
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            examples.append(_language_example(row, tokenizer, max_length))
        except (ValueError, TemplateError) as error:
            raise DataError(f"{source}, row {number}: {first_line(error)}") from error
        except TypeError as error:  # the error of `tokenizers` for an unpaired surrogate
            raise DataError(f"{source}, row {number}: the text is not Unicode: unpaired surrogate") from error
    return examples


def classification_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str, names: Sequence[str]
) -> list[Example]:
    """Return the tokens of each row and the index of its label in `names`. Raises DataError with the row's number."""
    examples = []
    for number, row in enumerate(rows, 1):
        match row:
            case {"text": str(text), "label": str() | int() as label} if text and str(label) in names:
                pair = row.get("text_pair")
                tokens = tokenizer(text, pair, truncation=True, max_length=max_length)
                examples.append({**tokens, "labels": names.index(str(label))})
            case _:
                raise DataError(
                    f'{source}, row {number}: a row must be {{"text", "label"}} with one of the labels '
                    f"{', '.join(names)}; this row has: {', '.join(row)}, label {row.get('label')!r}"
                )
    return examples


def label_names(rows: Iterable[Row]) -> list[str]:
    """Return the distinct labels as text: numbers in numeric order, then words in alphabetical order."""
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
            # The template has added all special tokens; a server tokenises its output in the same way.
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        case _:
            raise ValueError(
                'a row must be {"prompt", "completion"}, {"messages"} or {"text"}, each with non-empty text; '
                f"this row has: {', '.join(row)}"
            )
    n_prompt = len(ids)
    if n_prompt >= max_length:
        raise ValueError(f"the prompt alone has {n_prompt} tokens: raise max_length (now {max_length})")
    # A beginning-of-sequence token is added to a text without a prompt, not to a completion.
    ids = ids + tokenizer(completion, add_special_tokens=not ids)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return {"input_ids": ids[:max_length], "labels": ([IGNORED] * n_prompt + ids[n_prompt:])[:max_length]}


def _chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the prompt as a server renders it, and the last answer with the template's text around it."""
    for message in messages:
        match message:
            case {"role": str(), "content": str(content)} if content.strip():
                continue
        raise ValueError('each of "messages" needs "role" and a non-empty "content"')
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError('"messages" need a question, and at the end the answer to learn, with the role "assistant"')
    if not tokenizer.chat_template:
        raise ValueError(
            '"messages" need a chat template, which this base does not have: use "prompt" and "completion"'
        )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    answered = [*messages[:-1], {**messages[-1], "content": _PLACEHOLDER}]  # a template may change a real answer
    before, found, after = tokenizer.apply_chat_template(answered, tokenize=False).rpartition(_PLACEHOLDER)
    if not found or not before.startswith(prompt):
        raise ValueError("this base's chat template renders the earlier turns differently when an answer follows")
    return prompt, before[len(prompt) :] + messages[-1]["content"] + after.rstrip()


def batches(examples: Sequence[Example], size: int, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Return batches of `size` examples in their order, padded on the right to the longest example of the batch."""
    return [_collate(examples[i : i + size], tokenizer) for i in range(0, len(examples), size)]


def _collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
    tokens = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
    batch: Batch = dict(tokenizer.pad(tokens, padding_side="right", return_tensors="pt"))
    labels = [example["labels"] for example in examples]
    if isinstance(labels[0], int):
        return {**batch, "labels": torch.tensor(labels)}
    length = batch["input_ids"].shape[1]
    return {**batch, "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels])}
