"""The order of a classifier's labels, and the labels that cannot be used."""

import pytest

from trainer.data import classification_examples, label_names
from trainer.data.files import NamedClass
from trainer.errors import DataError


def rows_of(*labels: object) -> list[dict[str, object]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((10, 9, 10), ["9", "10"]),
        (("10", "9", "2"), ["2", "9", "10"]),  # a csv file has numbers as text
        (("1.5", "-1", "0"), ["-1", "0", "1.5"]),
        (("no", "yes", "None"), ["None", "no", "yes"]),
        ((2, "b", 1, "a"), ["1", "2", "a", "b"]),
        ((1.0, 0.0), ["0", "1"]),
        ((True, False), ["False", "True"]),
        ((1, None, 0), ["0", "1"]),
    ],
)
def test_numbers_are_in_numeric_order_and_words_in_alphabetical_order(labels, names) -> None:
    assert label_names(rows_of(*labels)) == names


def test_named_classes_keep_the_order_of_their_data_set() -> None:
    classes = [NamedClass(name, number) for number, name in enumerate(("negative", "neutral", "3 stars", "best"))]
    assert label_names(rows_of(*classes[::-1])) == ["negative", "neutral", "3 stars", "best"]
    assert label_names(rows_of(classes[3], classes[0])) == ["negative", "best"]
    assert label_names(rows_of(*classes, "another")) == ["3 stars", "another", "best", "negative", "neutral"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ((1, "1"), 'row 2: label "1" beside label 1: write both as text, or both as numbers'),
        (("a", "0", "b", 0), 'row 4: label 0 beside label "0"'),
        (("True", True), 'row 2: label true beside label "True"'),
        (("a", ["b"]), 'row 2: label must be a word or a whole number, not ["b"]'),
        (("a", {"b": 1}), 'row 2: label must be a word or a whole number, not {"b": 1}'),
        (("a", 0.5), "row 2: label must be a word or a whole number, not 0.5"),
        (("a", " "), 'row 2: label must be a word or a whole number, not " "'),
    ],
)
def test_labels_that_cannot_be_told_apart_or_used_are_refused(labels, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        label_names(rows_of(*labels), "data.csv")
    assert str(caught.value).startswith(f"data.csv, {reason}")


def test_a_row_has_the_index_of_its_label(tokenizer) -> None:
    rows = [{"text": "x", "label": "no"}, {"text": "y", "text_pair": "z", "label": "yes"}]
    first, second = classification_examples(rows, tokenizer, 8, "rows", label_names(rows))
    assert (first["labels"], second["labels"]) == (0, 1)
    assert tokenizer.decode(second["input_ids"]) == "yz"
    (number,) = classification_examples([{"text": "x", "label": 1}], tokenizer, 8, "rows", ["0", "1"])
    assert number["labels"] == 1


@pytest.mark.parametrize("label", ["maybe", "", None, ["no"]])
def test_an_unknown_label_is_refused(tokenizer, label) -> None:
    with pytest.raises(DataError, match=r"row 1: .* labels no, yes; this row has: text, label, label ") as caught:
        classification_examples([{"text": "x", "label": label}], tokenizer, 8, "rows", ["no", "yes"])
    assert str(caught.value).endswith(repr(label))
