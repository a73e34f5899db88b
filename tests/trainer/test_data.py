"""Rows to token ids and labels, and one line for every row that cannot be used."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trainer.data import IGNORED, Example, collate, read_examples, shuffled_batches
from trainer.errors import DataError


def test_the_loss_is_on_the_completion_alone(tokenizer, jsonl) -> None:
    (example,) = read_examples(jsonl([{"prompt": "a b", "completion": " c d"}]), tokenizer, 64)
    n = len(tokenizer("a b")["input_ids"])
    assert example.labels[:n] == [IGNORED] * n
    assert tokenizer.decode(example.labels[n:]) == " c d<|end|>"
    assert tokenizer.decode(example.ids) == "a b c d<|end|>"


def test_a_text_row_is_learned_whole_and_ends(tokenizer, jsonl) -> None:
    (example,) = read_examples(jsonl([{"text": "import os"}]), tokenizer, 64)
    assert example.labels == example.ids
    assert tokenizer.decode(example.ids) == "import os<|end|>"


def test_messages_are_learned_in_the_form_that_a_server_asks_in(tokenizer, jsonl) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    (example,) = read_examples(jsonl([{"messages": messages}]), tokenizer, 64)
    n = sum(label == IGNORED for label in example.labels)
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(example.ids[:n]) == asked
    assert tokenizer.decode(example.ids[n:]) == "hello<|end|>"


@pytest.mark.parametrize("answer", ["d", "end", "e", "Yes.\n", "<|", "hello|>"])
def test_an_answer_is_learned_whole_also_where_the_template_holds_its_letters(tokenizer, jsonl, answer: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    (example,) = read_examples(jsonl([{"messages": messages}]), tokenizer, 64)
    assert tokenizer.decode([label for label in example.labels if label != IGNORED]) == f"{answer}<|end|>"


def test_a_template_that_trims_and_puts_words_before_the_answer_is_learned_with_them(tokenizer, jsonl, monkeypatch):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": " q "}, {"role": "assistant", "content": "a"}]
    (example,) = read_examples(jsonl([{"messages": messages}]), tokenizer, 64)
    assert tokenizer.decode(example.ids) == "[user]q<|end|>[assistant]<think></think>a<|end|>"
    assert tokenizer.decode([i for i in example.labels if i != IGNORED]) == "<think></think>a<|end|>"


def test_a_beginning_of_sequence_token_comes_once_and_never_before_a_completion(tokenizer, jsonl) -> None:
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
    rows = [{"messages": messages}, {"prompt": "q", "completion": " a", "text": "left over"}, {"text": "q"}]
    decoded = [with_bos.decode(example.ids) for example in read_examples(jsonl(rows), with_bos, 64)]
    assert decoded == [f"{bos}q<|end|>a<|end|>", f"{bos}q a<|end|>", f"{bos}q<|end|>"]


def test_a_row_may_hold_any_unicode_line_separator(tokenizer, tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(read_examples(file, tokenizer, 64)) == 1


def test_long_rows_lose_their_end(tokenizer, jsonl) -> None:
    (example,) = read_examples(jsonl([{"text": "word " * 50}]), tokenizer, 10)
    assert len(example.ids) == len(example.labels) == 10


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, "this one has: question, answer"),
        ({"prompt": "a"}, "this one has: prompt"),
        ({"prompt": "a", "completion": ""}, "non-empty"),
        ({"text": 3}, "this one has: text"),
        ([1, 2], "this one has: list"),
        ({"messages": []}, "this one has: messages"),
        ({"messages": [{"role": "user"}]}, 'needs "role"'),
        ({"messages": [{"role": "user", "content": "x"}]}, 'of the role "assistant"'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "need a question"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "non-empty"),
        ({"text": "\ud83d"}, "half a surrogate pair"),
        ({"prompt": "word " * 99, "completion": "x"}, "raise max_length"),
    ],
)
def test_a_row_of_neither_form_is_refused_with_its_line_number(tokenizer, jsonl, row, reason) -> None:
    file = jsonl([{"text": "good"}, row])
    with pytest.raises(DataError, match="line 2: ") as caught:
        read_examples(file, tokenizer, 64)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_no_json_is_refused_with_its_number(tokenizer, tmp_path) -> None:
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


def test_padding_is_masked_and_has_no_label() -> None:
    batch = collate([Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [4])], pad_id=0)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]


def test_shuffled_batches_show_every_row_once_per_epoch() -> None:
    stream = shuffled_batches([Example([i], [i]) for i in range(10)], 4, 0, torch.Generator().manual_seed(0))
    seen = torch.cat([next(stream).ids.flatten() for _ in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
