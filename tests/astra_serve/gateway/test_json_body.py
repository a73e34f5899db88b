"""JSON that Python reads and this server does not accept."""

import pytest

from astra_serve.gateway import json_body
from astra_serve.gateway.json_body import Unusable


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"a": NaN}', "has NaN"),
        (b'{"a": [-Infinity]}', "has -Infinity"),
        (b'{"a": 1e999}', "has 1e999"),
        (rb'{"a": "\ud800"}', "lone surrogate"),
        (rb'{"a": [{"\uDFFF": 1}]}', "lone surrogate"),
        ('{"a": "\\ud800"}'.encode("utf-16"), "lone surrogate"),
        (rb'[1, 2, "\ud800"]', "lone surrogate"),
    ],
)
def test_values_that_cannot_be_written_again_are_named(body: bytes, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        json_body.parse(body)
    assert reason in (json_body.fault(body) or "")


@pytest.mark.parametrize("body", [rb'"\ud83d\ude00"', rb'"\\ud800"', b"1e308", b"[1, -2.5]", '"é😀"'.encode()])
def test_ordinary_json_is_read(body: bytes) -> None:
    json_body.parse(body)
    assert json_body.fault(body) is None


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b'"\xed\xa0\x80"'])
def test_other_text_has_a_reason_in_one_line(body: bytes) -> None:
    assert "\n" not in (json_body.fault(body) or "\n")
