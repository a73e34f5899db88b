"""The decisions about limits, as functions of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_serve.document.keys import TenantLimits
from astra_serve.gateway.tenancy.quota.standing import DAY, MINUTE, Standing, Window, are_limited, duration

AMOUNTS = st.integers(0, 2**40)
WINDOWS = st.builds(Window, AMOUNTS, AMOUNTS, st.integers(1, MINUTE))


def after(window: Window, wait: int) -> Window:
    """Return the window after a time in which nothing is used."""
    if wait < window.left:
        return Window(window.previous, window.current, window.left - wait)
    wait -= window.left
    return Window(window.current, 0, MINUTE - wait) if wait < MINUTE else Window(0, 0, MINUTE)


@given(WINDOWS, AMOUNTS, AMOUNTS)
def test_a_request_fits_after_the_time_that_it_is_told_to_wait_and_not_before(
    window: Window, amount: int, more: int
) -> None:
    limit = amount + more
    wait = window.wait(amount, limit)
    assert after(window, wait).fits(amount, limit)
    assert wait == 0 or not after(window, wait - 1).fits(amount, limit)


@given(WINDOWS, AMOUNTS)
def test_what_remains_fits_and_one_more_does_not(window: Window, limit: int) -> None:
    remaining = window.remaining(limit)
    assert remaining == 0 or window.fits(remaining, limit)
    assert not window.fits(remaining + 1, limit)


@given(WINDOWS, AMOUNTS)
def test_after_the_reset_the_whole_limit_remains(window: Window, limit: int) -> None:
    assert after(window, window.reset).remaining(limit) == limit


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (1, "1s"), (60, "1m0s"), (360, "6m0s"), (3600, "1h0m0s"), (86399, "23h59m59s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: int, text: str) -> None:
    assert duration(seconds) == text


NOTHING = Standing(Window(0, 0, MINUTE), 0, DAY, 0)
ALL = TenantLimits(requests_per_minute=10, tokens_per_minute=100, tokens_per_day=1000, requests_at_a_time=2)


@pytest.mark.parametrize(
    ("standing", "tokens", "kind", "retry", "names"),
    [
        (Standing(Window(0, 60, 10_000), 60, DAY, 0), 41, "tokens", 11, "100 tokens per minute, 40 are left"),
        (Standing(Window(0, 0, MINUTE), 990, 7_200_000, 0), 11, "tokens", 7200, "1000 tokens a day"),
        (Standing(Window(0, 0, MINUTE), 0, DAY, 2), 1, "requests", 1, "2 requests at a time, and 2 run"),
        (Standing(Window(0, 0, MINUTE), 0, DAY, 0, Window(0, 10, 500), False), 1, "requests", 7, "10 requests per"),
        (Standing(Window(0, 60, 10_000), 990, 7_200_000, 2), 41, "tokens", 7200, "a day"),  # the longest wait
        (NOTHING, 101, "tokens", None, "send a shorter prompt"),
        (NOTHING, 1001, "tokens", None, "send a shorter prompt"),
    ],
)
def test_a_refusal_names_the_limit_and_the_seconds_to_wait(standing, tokens, kind, retry, names) -> None:
    refusal = standing.refusal(ALL, tokens)
    assert refusal is not None
    assert (refusal.kind, refusal.retry_after_s) == (kind, retry)
    assert names in str(refusal)


def test_a_request_that_reaches_every_limit_exactly_is_admitted() -> None:
    assert Standing(Window(0, 0, MINUTE), 900, DAY, 1).refusal(ALL, 100) is None


def test_only_limits_that_exist_have_headers() -> None:
    standing = Standing(Window(0, 30, 20_000), 30, 3_600_000, 1, Window(5, 1, 30_000))
    assert dict(standing.headers(ALL)) == {
        b"x-ratelimit-limit-requests": b"10",
        b"x-ratelimit-remaining-requests": b"6",
        b"x-ratelimit-reset-requests": b"1m30s",
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"70",
        b"x-ratelimit-reset-tokens": b"1m20s",
    }
    a_day = dict(standing.headers(TenantLimits(tokens_per_day=1000)))
    assert a_day == {
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"970",
        b"x-ratelimit-reset-tokens": b"1h0m0s",
    }
    assert standing.headers(TenantLimits()) == []


def test_a_default_alone_is_no_limit() -> None:
    assert not are_limited(TenantLimits(default_max_tokens=5))
    assert are_limited(TenantLimits(requests_at_a_time=5))
