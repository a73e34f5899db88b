"""Data files of each format, and the error for a file that cannot be read."""

import gzip
import json
from pathlib import Path

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from trainer.data import digest, label_names, read_rows
from trainer.errors import DataError

ROWS = [{"question": "a", "answer": " b"}, {"question": "c", "answer": " d"}]


def written(folder: Path, name: str) -> Path:
    """Write ROWS in the format that `name` stands for."""
    file, lower = folder / name, name.lower()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if "parquet" in lower:
        pandas.DataFrame(ROWS).to_parquet(file, index=False)
        return file
    if "csv" in lower or "tsv" in lower:
        text = pandas.DataFrame(ROWS).to_csv(index=False, sep="\t" if "tsv" in lower else ",")
    else:
        text = lines if "lines" in lower else json.dumps(ROWS, indent=1)
    content = text.encode()
    file.write_bytes(gzip.compress(content) if lower.endswith(".gz") else content)
    return file


@pytest.mark.parametrize(
    "name",
    [
        "array.json", "lines.json", "lines.jsonl", "array.jsonl", "lines.ndjson", "data.parquet", "data.csv",
        "data.tsv", "lines.JSONL", "data.CSV", "data.Tsv", "data.PARQUET", "lines.jsonl.gz", "array.json.gz",
        "lines.JSONL.GZ", "data.csv.gz",
    ],
)  # fmt: skip
def test_each_file_format_gives_the_same_rows_with_renamed_columns(tmp_path, name: str) -> None:
    rows = read_rows(str(written(tmp_path, name)), columns={"prompt": "question", "completion": "answer"})
    assert rows == [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}]


def test_text_of_a_csv_file_is_text(tmp_path) -> None:
    values = ["NA", "None", "null", "nan", "007", "1.50", "true", "", " x ", 'a "b", c', "two\nlines"]
    file = tmp_path / "data.csv"
    pandas.DataFrame({"prompt": "p", "completion": values}).to_csv(file, index=False)
    assert [row["completion"] for row in read_rows(str(file))] == values


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.csv.gz"])
def test_text_of_the_csv_files_of_a_data_set_is_text(tmp_path, name: str) -> None:
    values = ["NA", "None", "null", "nan", "007", "1.50", "true", "", " x ", 'a "b", c', "two\nlines"]
    folder = tmp_path / "data"
    folder.mkdir()
    separator = "\t" if "tsv" in name else ","
    pandas.DataFrame({"prompt": 7, "completion": values}).to_csv(folder / name, index=False, sep=separator)
    assert read_rows(str(folder)) == [{"prompt": "7", "completion": value} for value in values]
    assert len(read_rows(str(folder), "train[:3]")) == 3


def test_named_classes_of_a_data_set_are_their_names(tmp_path) -> None:
    label = ClassLabel(names=["world", "sport", "art"])
    rows = {"text": ["a", "b", "c"], "label": [2, 0, -1]}
    data = Dataset.from_dict(rows, features=Features({"text": Value("string"), "label": label}))
    data.to_parquet(tmp_path / "data.parquet")
    found = read_rows(str(tmp_path / "data.parquet"))
    assert [row["label"] for row in found] == ["art", "world", None]
    assert label_names(found) == ["world", "art"]  # in the order of their numbers


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path) -> None:
    (tmp_path / "data.csv").write_text("text,label\nx,y\n", encoding="utf-8-sig")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n', encoding="utf-8-sig")
    assert read_rows(str(tmp_path / "data.csv")) == [{"text": "x", "label": "y"}]
    assert read_rows(str(tmp_path / "data.jsonl")) == [{"text": "x"}]


def test_one_object_in_several_lines_is_one_row(tmp_path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(ROWS[0], indent=2))
    assert read_rows(str(tmp_path / "data.json")) == [ROWS[0]]


def test_fields_that_other_rows_of_a_table_have_are_not_in_a_message(tmp_path) -> None:
    file = tmp_path / "data.parquet"
    calls = [{"function": {"name": "w", "arguments": {"city": "Paris"}}}]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}]
    other = [{"function": {"name": "v", "arguments": {"day": 1}}}]
    rows = [{"messages": messages}, {"messages": [{"role": "assistant", "tool_calls": other}]}]
    pandas.DataFrame(rows).to_parquet(file, index=False)
    assert read_rows(str(file)) == rows


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.csv", b"a,b\n1,2,3\n", "line 2: 3 fields, but 2 columns"),
        ("data.csv", b"a,b\n1\n", "line 2: 1 fields, but 2 columns"),
        ("data.csv", b'a,b\n"1,2\n3,4\n', "unexpected end of data"),
        ("data.csv", b"a,a\n1,2\n", "two columns of the header have the same name"),
        ("data.csv", b"", "has no rows"),
        ("data.csv", b"a,b\n", "has no rows"),
        ("data.csv", b"a\xff\n", "cannot be read"),
        ("data.jsonl", b"[1]", "row 1: a row must be a JSON object, not int"),
        ("data.jsonl", b'{"a": 1}\n3\n', "line 2: a row must be a JSON object, not int"),
        ("data.jsonl", b'[{"a": 1},', "Expecting"),
        ("data.json", b'{"a": 1}\n{"a": \n', "line 2: Expecting"),
        ("data.json", b"", "has no rows"),
        ("data.jsonl.gz", b"no archive", "cannot be read"),
        ("data.jsonl.gz", gzip.compress(b'{"a": 1}')[:-9], "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_gives_one_line(tmp_path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    assert reason in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_column_is_refused_with_the_available_columns(jsonl) -> None:
    with pytest.raises(DataError, match="no column 'qestion' for 'prompt'; available: question, answer"):
        read_rows(str(jsonl(ROWS)), columns={"prompt": "qestion"})


@pytest.mark.parametrize(
    "source", ["no_such.parquet", "no_such.csv", "no_such_data_set", "/no/such/folder", "org/n.xyz"]
)
def test_a_source_that_is_neither_file_nor_data_set_is_refused(source: str, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="is neither a readable json, jsonl, parquet or csv file nor a hub data set"):
        read_rows(source)


def test_the_digest_depends_on_the_rows_and_their_order() -> None:
    assert digest([{"a": 1, "b": 2}]) == digest([{"b": 2, "a": 1}])
    assert len({digest([1, 2]), digest([2, 1]), digest([1]), digest([])}) == 4
