"""Conversion of rows into token ids and labels, and the error for each row that cannot be used."""

import json

import pandas
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trainer.data import (
    IGNORED,
    Example,
    batches,
    classification_examples,
    digest,
    label_names,
    language_examples,
    read_rows,
)
from trainer.errors import DataError


def read_examples(file, tokenizer, max_length: int) -> list[Example]:
    return language_examples(read_rows(str(file)), tokenizer, max_length, str(file))


def test_the_loss_is_on_the_completion_only(tokenizer, jsonl) -> None:
    (example,) = read_examples(jsonl([{"prompt": "a b", "completion": " c d"}]), tokenizer, 64)
    n = len(tokenizer("a b")["input_ids"])
    assert example["labels"][:n] == [IGNORED] * n
    assert tokenizer.decode(example["labels"][n:]) == " c d<|end|>"
    assert tokenizer.decode(example["input_ids"]) == "a b c d<|end|>"


def test_every_token_of_a_text_row_counts_in_the_loss(tokenizer, jsonl) -> None:
    (example,) = read_examples(jsonl([{"text": "import os"}]), tokenizer, 64)
    assert example["labels"] == example["input_ids"]
    assert tokenizer.decode(example["input_ids"]) == "import os<|end|>"


def test_the_prompt_of_a_chat_is_the_prompt_that_a_server_renders(tokenizer, jsonl) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    (example,) = read_examples(jsonl([{"messages": messages}]), tokenizer, 64)
    n = sum(label == IGNORED for label in example["labels"])
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(example["input_ids"][:n]) == asked
    assert tokenizer.decode(example["input_ids"][n:]) == "hello<|end|>"


@pytest.mark.parametrize("answer", ["d", "end", "e", "Yes.\n", "<|", "hello|>"])
def test_the_labels_are_the_whole_answer_even_if_the_template_contains_it(tokenizer, jsonl, answer: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    (example,) = read_examples(jsonl([{"messages": messages}]), tokenizer, 64)
    assert tokenizer.decode([label for label in example["labels"] if label != IGNORED]) == f"{answer}<|end|>"


def test_text_of_the_template_around_the_answer_has_labels(tokenizer, jsonl, monkeypatch):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": " q "}, {"role": "assistant", "content": "a"}]
    (example,) = read_examples(jsonl([{"messages": messages}]), tokenizer, 64)
    assert tokenizer.decode(example["input_ids"]) == "[user]q<|end|>[assistant]<think></think>a<|end|>"
    assert tokenizer.decode([i for i in example["labels"] if i != IGNORED]) == "<think></think>a<|end|>"


def test_each_row_has_one_beginning_of_sequence_token(tokenizer, jsonl) -> None:
    bos = "<|system|>"
    with_bos = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
        bos_token=bos,
    )
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, with_bos.bos_token_id)]
    )
    with_bos.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": messages}, {"prompt": "q", "completion": " a", "text": "unused"}, {"text": "q"}]
    decoded = [with_bos.decode(example["input_ids"]) for example in read_examples(jsonl(rows), with_bos, 64)]
    assert decoded == [f"{bos}q<|end|>a<|end|>", f"{bos}q a<|end|>", f"{bos}q<|end|>"]


def test_a_row_may_contain_unicode_line_separators(tokenizer, tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(read_examples(file, tokenizer, 64)) == 1


def test_long_rows_are_cut_at_the_end(tokenizer, jsonl) -> None:
    (example,) = read_examples(jsonl([{"text": "word " * 50}]), tokenizer, 10)
    assert len(example["input_ids"]) == len(example["labels"]) == 10


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, "this row has: question, answer"),
        ({"prompt": "a"}, "this row has: prompt"),
        ({"prompt": "a", "completion": ""}, "non-empty"),
        ({"text": 3}, "this row has: text"),
        ({"messages": []}, "this row has: messages"),
        ({"messages": [{"role": "user"}]}, 'needs "role"'),
        ({"messages": [{"role": "user", "content": "x"}]}, 'with the role "assistant"'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "need a question"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "non-empty"),
        ({"text": "\ud83d"}, "unpaired surrogate"),
        ({"prompt": "word " * 99, "completion": "x"}, "raise max_length"),
    ],
)
def test_an_invalid_row_is_refused_with_its_number(tokenizer, jsonl, row, reason) -> None:
    file = jsonl([{"text": "good"}, row])
    with pytest.raises(DataError, match="row 2: ") as caught:
        read_examples(file, tokenizer, 64)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_not_json_is_refused_with_its_number(tokenizer, tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "good"}) + "\n\n{oops\n")
    with pytest.raises(DataError, match="line 3: "):
        read_examples(file, tokenizer, 64)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_readable_rows_is_refused(tokenizer, tmp_path, content) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match="data file"):
        read_examples(file, tokenizer, 64)


def test_a_chat_row_needs_a_chat_template(tokenizer, jsonl, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match="chat template"):
        read_examples(jsonl([{"messages": messages}]), tokenizer, 64)


def test_padding_is_masked_and_has_no_label(tokenizer) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    (batch,) = batches(rows, 2, tokenizer)
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]


def test_prompt_and_completion_may_be_messages(tokenizer) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    whole, split = language_examples(
        [{"messages": [question, answer]}, {"prompt": [question], "completion": [answer]}], tokenizer, 64, "rows"
    )
    assert whole == split


ROWS = [{"question": "a", "answer": " b"}, {"question": "c", "answer": " d"}]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv"])
def test_each_file_format_gives_the_same_rows_with_renamed_columns(tmp_path, jsonl, kind: str) -> None:
    file = tmp_path / f"data.{kind}"
    if kind == "json":
        file.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        jsonl(ROWS, file.name)
    else:
        getattr(pandas.DataFrame(ROWS), f"to_{kind}")(file, index=False)
    rows = read_rows(str(file), columns={"prompt": "question", "completion": "answer"})
    assert rows == [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}]


def test_an_unknown_column_is_refused_with_the_available_columns(jsonl) -> None:
    with pytest.raises(DataError, match="no column 'qestion' for 'prompt'; available: question, answer"):
        read_rows(str(jsonl(ROWS)), columns={"prompt": "qestion"})


@pytest.mark.parametrize("source", ["no_such.parquet", "no_such_data_set", "/no/such/folder", "org/name.xyz"])
def test_a_source_that_is_neither_file_nor_data_set_is_refused(source: str, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="is neither a readable json, jsonl, parquet or csv file nor a hub data set"):
        read_rows(source)


def test_labels_are_words_or_numbers_in_a_fixed_order(tokenizer) -> None:
    assert label_names([{"label": 10}, {"label": 9}, {"label": 10}]) == ["9", "10"]
    rows = [{"text": "x", "label": "no"}, {"text": "y", "text_pair": "z", "label": "yes"}]
    first, second = classification_examples(rows, tokenizer, 8, "rows", label_names(rows))
    assert (first["labels"], second["labels"]) == (0, 1)
    assert tokenizer.decode(second["input_ids"]) == "yz"


def test_an_unknown_label_is_refused(tokenizer) -> None:
    with pytest.raises(DataError, match=r"row 1: .* labels no, yes; this row has: text, label, label 'maybe'"):
        classification_examples([{"text": "x", "label": "maybe"}], tokenizer, 8, "rows", ["no", "yes"])


def test_the_digest_depends_on_the_rows_and_their_order() -> None:
    assert digest([{"a": 1, "b": 2}]) == digest([{"b": 2, "a": 1}])
    assert len({digest([1, 2]), digest([2, 1]), digest([1]), digest([])}) == 4
