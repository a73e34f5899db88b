"""The rows of a data file or of a hub data set.

    .json .jsonl .ndjson    objects, one per line, or an array of objects; values keep their JSON types
    .csv .tsv               a header, then rows; every value is text, as it is written (`NA`, `None` and `007` too)
    .parquet                columns with types

Names may be in capitals, and all but .parquet may end in `.gz`. Any other name is that of a hub data set, or of a
folder with its files. The values of its CSV files are text, too, unless the data set declares other types. Its named
classes (`datasets.ClassLabel`) are stored as numbers; their rows have the names.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from converter.errors import first_line
from trainer.errors import DataError

Row = dict[str, Any]

_JSON = ("json", "jsonl", "ndjson")
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_MAX_FIELD = 2**31 - 1  # characters; the limit of Python's csv is 128 KiB, less than one long document


def read_rows(source: str, split: str = "train", columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return the rows of a local file (see the module), or of the `split` of a hub data set.

    `columns` maps the column names of this package to those of the source. Raises DataError.
    """
    path, kind = Path(source), _kind(source)
    if kind in _JSON and (path.exists() or source.count("/") != 1):
        rows = list(_json_rows(path, _text(path), whole=kind == "json"))
    elif kind in _DELIMITERS and path.exists():
        rows = list(_csv_rows(path, _text(path), _DELIMITERS[kind]))
    else:
        rows = _library_rows(source, split, is_file=kind == "parquet" and path.exists())
    for ours, theirs in (columns or {}).items():
        for row in rows:
            if theirs not in row:
                raise DataError(f"{source} has no column {theirs!r} for {ours!r}; available: {', '.join(row)}")
            row[ours] = row.pop(theirs)
    if not rows:
        raise DataError(f"data file {source} has no rows")
    return rows


def digest(rows: Iterable[Any]) -> str:
    """Return the SHA-256 of rows (JSON values) in their order, as `sha256:...`."""
    found = hashlib.sha256()
    for row in rows:
        found.update(
            json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        )
    return f"sha256:{found.hexdigest()}"


def _kind(source: str) -> str:
    """Return the end of a file's name that defines its format, in small letters and without `.gz`."""
    return source.lower().removesuffix(".gz").rpartition(".")[2]


def _text(path: Path) -> str:
    """Return the text of a file, unpacked and without byte order mark. Raises DataError."""
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read: {first_line(error)}") from error


def _json_rows(path: Path, text: str, *, whole: bool) -> Iterator[Row]:
    """Yield the rows of a JSON file unchanged: `datasets` would force the same columns and types on all rows.

    An array is read as one document, and so is other text if `whole`; text with one object per line is then read too.
    """
    if text.lstrip().startswith("[") or whole:
        try:
            document = json.loads(text)
        except ValueError as error:
            if not (whole and text.lstrip().startswith("{")) and text.strip():
                raise DataError(f"{path}: {first_line(error)}") from error
        else:
            for number, row in enumerate(document if isinstance(document, list) else [document], 1):
                yield _checked(row, f"{path}, row {number}")
            return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {first_line(error)}") from error
            yield _checked(row, f"{path}, line {number}")


def _checked(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be a JSON object, not {type(row).__name__}")
    return row


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a table; all values are text, since a type that is guessed turns `NA` into nothing."""
    csv.field_size_limit(_MAX_FIELD)
    # strict: otherwise a quote that is not closed takes the rest of the file into one field
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}: two columns of the header have the same name: {', '.join(header)}")
        for fields in reader:
            if fields and len(fields) != len(header):
                raise DataError(f"{path}, line {reader.line_num}: {len(fields)} fields, but {len(header)} columns")
            if fields:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {first_line(error)}") from error


class NamedClass(str):
    """The name of a class of a data set, with its number there."""

    number: int

    def __new__(cls, name: str, number: int) -> "NamedClass":
        """Return the name as text that knows its number."""
        found = super().__new__(cls, name)
        found.number = number
        return found


def _library_rows(source: str, split: str, *, is_file: bool) -> list[Row]:
    from datasets import load_dataset  # its import takes a second, and text formats do not need it
    from datasets.exceptions import DatasetsError

    try:
        if is_file:
            found = load_dataset("parquet", data_files=source, split="train")
        else:
            found = load_dataset(source, split=split, **_as_text(source))
        classes = _classes(found.features)
        return [{key: _value(value, classes.get(key)) for key, value in row.items()} for row in found]
    except (DatasetsError, OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{source} is neither a readable json, jsonl, parquet or csv file nor a hub data set: {first_line(error)}"
        ) from error


def _as_text(source: str) -> dict[str, Any]:
    """Return the settings of `load_dataset` with which the values of a data set of CSV files stay text.

    None are needed for other files, and for columns whose types the data set declares. Raises as `datasets` does.
    """
    import fsspec
    from datasets import Features, Value, load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv

    builder = load_dataset_builder(source)
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    if not isinstance(builder, Csv) or builder.info.features or not files:
        return {}
    names = builder.config.column_names
    if names is None:
        encoding = builder.config.encoding or "utf-8-sig"
        with fsspec.open(files[0], "rt", encoding=encoding, newline="", compression="infer") as stream:
            names = next(csv.reader(stream, delimiter=builder.config.sep), [])
    return {"features": Features({name: Value("string") for name in names}), "na_filter": False}


def _classes(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the classes, by their numbers, of each column that has named classes."""
    from datasets import ClassLabel

    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _value(value: Any, names: Sequence[str] | None) -> Any:
    if names is None:
        return _without_none(value)
    is_class = isinstance(value, int) and 0 <= value < len(names)  # -1: the label is hidden, as in tests of contests
    return NamedClass(names[value], value) if is_class else None


def _without_none(value: Any) -> Any:
    """Return a value without the None that a table has for each key of an object which only other rows have."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
