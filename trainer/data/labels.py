"""The names of a classifier's labels.

A label is a word, or a number without a fraction. The class numbers follow the numbers in numeric order, whether the
data has them as numbers or as text, then the words in alphabetical order. Named classes of a data set keep the order of
their numbers there.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from trainer.data.files import NamedClass, Row
from trainer.errors import DataError

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def label_names(rows: Iterable[Row], source: str = "data") -> list[str]:
    """Return the distinct labels as text, in the order of the class numbers; rows without a label do not count.

    Raises DataError with the row's number for a label that is neither a word nor a number, and for a number beside the
    same number as text: whether these are one class or two cannot be known.
    """
    found: dict[str, Any] = {}
    for number, row in enumerate(rows, 1):
        label = row.get("label")
        if label is None:
            continue
        text = label_text(label)
        if text is None:
            raise DataError(f"{source}, row {number}: label must be a word or a whole number, not {_shown(label)}")
        first = found.setdefault(text, label)
        if isinstance(first, str) != isinstance(label, str):
            raise DataError(
                f"{source}, row {number}: label {_shown(label)} beside label {_shown(first)}: write both as text, or "
                "both as numbers"
            )
    if all(isinstance(label, NamedClass) for label in found.values()):
        return sorted(found, key=lambda name: found[name].number)
    return sorted(found, key=_position)


def label_text(label: Any) -> str | None:
    """Return the name of a row's label; None if it is empty, or neither a word nor a whole number."""
    match label:
        case str():
            return label if label.strip() else None
        case int():
            return str(label)
        case float() if label.is_integer():
            return str(int(label))  # a column of integers with gaps is one of floats in parquet
    return None


def _position(name: str) -> tuple[bool, float, str]:
    return (False, float(name), name) if _NUMBER.fullmatch(name) else (True, 0.0, name)


def _shown(label: Any) -> str:
    return json.dumps(label, ensure_ascii=False, default=str)[:80]
