"""Conversion of rows into token ids and labels, and the error for each row that cannot be used."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trainer.base import stop_tokens
from trainer.config import TrainConfig
from trainer.data import (
    IGNORED,
    batches,
    language_examples,
    read_rows,
)
from trainer.data.examples import CUT, SKIPPED, Examples
from trainer.errors import DataError


def read_examples(file, tokenizer, max_length: int) -> Examples:
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


def test_a_row_whose_prompt_fills_the_length_is_left_out_and_counted(tokenizer, jsonl) -> None:
    long = {"prompt": "word " * 99, "completion": "x"}
    found = read_examples(jsonl([{"text": "good"}, long, {"prompt": "a", "completion": " b"}, long]), tokenizer, 64)
    assert len(found) == 2
    assert found.remarks == {SKIPPED: 2}
    with pytest.raises(DataError, match=r"every prompt alone has at least 64 tokens, the longest .*: raise max_length"):
        read_examples(jsonl([long]), tokenizer, 64)


def test_cut_answers_are_counted(tokenizer) -> None:
    row = {"prompt": "a", "completion": " b c d"}
    n = len(language_examples([row], tokenizer, 64, "rows")[0]["input_ids"])
    for length, cut in ((n - 1, 1), (n, 0), (n + 1, 0)):
        found = language_examples([row, {"text": "x"}], tokenizer, length, "rows")
        assert found.remarks[CUT] == cut
        assert len(found[0]["input_ids"]) == min(n, length)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, "this row has: question, answer"),
        ({"prompt": "a"}, "this row has: prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the row is a preference, with two answers: set task=dpo"),
        ({"prompt": "a", "completion": ""}, "non-empty"),
        ({"text": 3}, "this row has: text"),
        ({"messages": []}, "this row has: messages"),
        ({"messages": [{"role": "user"}]}, 'needs "role"'),
        ({"messages": [{"role": "user", "content": "x"}]}, 'with the role "assistant"'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "need a question"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "non-empty"),
        ({"text": "\ud83d"}, "unpaired surrogate"),
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


def test_the_stop_tokens_are_those_of_the_generation_config(tmp_path) -> None:
    assert stop_tokens(tmp_path, TrainConfig()) == frozenset()
    for ids, found in ((7, {7}), ([7, 9], {7, 9}), (None, set())):
        GenerationConfig(eos_token_id=ids).save_pretrained(tmp_path)
        assert stop_tokens(tmp_path, TrainConfig()) == found
        assert stop_tokens(tmp_path, TrainConfig(generation={"eos_token_id": 8})) == found | {8}
