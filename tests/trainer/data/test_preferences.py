"""Rows with a chosen and a rejected answer as token ids, and the error for each row that cannot be used."""

import pytest

from trainer.data import IGNORED, as_trl, preference_examples, rejected_example
from trainer.data.examples import CUT, SKIPPED
from trainer.data.preferences import SAME
from trainer.errors import DataError

ROW = {"prompt": "a b", "chosen": " c d", "rejected": " e"}
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
)


def texts(row, tokenizer) -> list[str]:
    (example,) = preference_examples([row], tokenizer, 64, "data")
    return [tokenizer.decode(ids) for ids in as_trl(example).values()]


def test_text_rows_are_prompt_and_two_answers_that_end(tokenizer) -> None:
    assert texts(ROW, tokenizer) == ["a b", " c d<|end|>", " e<|end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # as many data sets have it
    ],
    ids=["three lists", "two conversations", "two conversations and the question"],
)
def test_conversations_have_the_prompt_that_a_server_renders(row, tokenizer) -> None:
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert texts(row, tokenizer) == [prompt, "y<|end|>", "n<|end|>"]


def test_both_answers_have_the_same_prompt_and_labels_on_the_answer(tokenizer) -> None:
    (example,) = preference_examples([ROW], tokenizer, 64, "data")
    other = rejected_example(example)
    n = example["labels"].count(IGNORED)
    assert example["input_ids"][:n] == other["input_ids"][:n]
    assert other["labels"] == [IGNORED] * n + other["input_ids"][n:]


def test_long_and_equal_rows_are_counted_and_cut(tokenizer) -> None:
    n = len(tokenizer(ROW["prompt"])["input_ids"])
    same, long = {**ROW, "rejected": ROW["chosen"]}, {**ROW, "prompt": "a b " * 40}
    found = preference_examples([ROW, same, long], tokenizer, n + 1, "data")
    assert found.remarks == {CUT: 1, SAME: 1, SKIPPED: 1}
    assert len(found[0]["input_ids"]) == n + 1
    with pytest.raises(DataError, match="data has no row to learn from: 1 left out: chosen and rejected are the same"):
        preference_examples([same], tokenizer, 64, "data")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, r'a row must be .*"rejected".* this row has: prompt, completion'),
        ({**ROW, "rejected": ""}, "each non-empty text"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no message in common"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, 'with the role "assistant"'),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, reason, tokenizer) -> None:
    with pytest.raises(DataError, match=f"data, row 2: .*{reason}"):
        preference_examples([ROW, row], tokenizer, 64, "data")
