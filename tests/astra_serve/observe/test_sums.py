"""What a request adds to the usage, and the questions about it."""

from datetime import date
from typing import Any

import pytest

from astra_serve.errors import BadQuery
from astra_serve.gateway.request import Request
from astra_serve.observe.sums import Key, Numbers, Question, day_of, numbers_of, question

TODAY = date(2026, 11, 28)


def ended(**facts: Any) -> Request:
    return Request("1", "/v1/completions", "a", None, **{"complete": True, **facts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "numbers"),
    [
        ({"status": 200, "prompt_tokens": 9, "cached_tokens": 4, "output_tokens": 7}, Numbers(1, 9, 4, 7)),
        ({"status": 400}, Numbers(1, errors=1)),
        ({"status": 429}, Numbers(1, limited=1)),
        ({"status": 503}, Numbers(1, errors=1)),
        ({"status": 200, "broke": True, "output_tokens": 2}, Numbers(1, output_tokens=2, errors=1)),
        ({"status": 200, "complete": False, "output_tokens": 2}, Numbers(1, output_tokens=2)),
    ],
)
def test_a_limited_request_is_no_error_and_a_broken_stream_is_one(facts: dict[str, Any], numbers: Numbers) -> None:
    assert numbers_of(ended(**facts)) == numbers


def test_a_day_is_one_of_utc() -> None:
    assert [day_of(second) for second in (1795910399.9, 1795910400.0)] == ["2026-11-28", "2026-11-29"]


def test_a_question_without_days_is_about_the_last_31() -> None:
    assert question({}, TODAY) == Question(date(2026, 10, 29), TODAY)
    assert question({"to": "2026-03-03"}, TODAY) == Question(date(2026, 2, 1), date(2026, 3, 3))
    assert question({"to": "0001-01-02"}, TODAY).first_day == date.min


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"from": "yesterday"}, "from=yesterday is no day: write it as 2026-11-28"),
        ({"to": "2026-02-30"}, "to=2026-02-30 is no day"),
        ({"to": "20260201"}, "is no day"),
        ({"from": "2026-11-29"}, "from 2026-11-29 is after to 2026-11-28"),
        ({"by": "day,model"}, "by=model is no column: give some of day, tenant, adapter, version"),
        ({"tennant": "a"}, "no parameter 'tennant': did you mean tenant?"),
        ({"x": "a"}, "there are: from, to, tenant, adapter, by, format"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_line(given: dict[str, str], reason: str) -> None:
    with pytest.raises(BadQuery, match=reason) as raised:
        question(given, TODAY)
    assert raised.value.param in given


def test_an_answer_has_the_days_tenant_and_adapter_of_the_question_and_its_columns_in_one_order() -> None:
    asked = question({"from": "2026-11-27", "tenant": "t", "adapter": "a", "by": "adapter,day"}, TODAY)
    keys = [Key("2026-11-27", "t", "a", "a@1"), Key("2026-11-28", "t", "a", "")]
    assert [asked.row_of(key) for key in keys] == [("2026-11-27", "a"), ("2026-11-28", "a")]
    assert all(asked.matches(key) for key in keys)
    for other in ({"day": "2026-11-26"}, {"day": "2026-11-29"}, {"tenant": "u"}, {"adapter": "b"}):
        assert not asked.matches(keys[0]._replace(**other))
