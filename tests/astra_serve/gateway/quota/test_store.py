"""One suite for the counters in memory and in a real Redis."""

import asyncio
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astra_serve.document.keys import TenantLimits
from astra_serve.errors import ServeError
from astra_serve.gateway.tenancy.quota.redis_store import LEASE_S, RedisStore
from astra_serve.gateway.tenancy.quota.store import Reservation
from tests.astra_serve.world import in_a_loop

MINUTE, DAY = 60_000, 86_400_000
NOON, MIDNIGHT = 43_200.0, 86_400.0
LIMITS = TenantLimits(tokens_per_minute=100, tokens_per_day=150, requests_at_a_time=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 120)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 150)),
        st.tuples(st.just("pass"), st.sampled_from([1, 500, 20_000, 59_999, 60_000, 61_000, 130_000])),
    ),
    max_size=25,
)


class Now:
    def __init__(self, seconds: float) -> None:
        self.ms = int(seconds * 1000)

    def __call__(self) -> float:
        return self.ms / 1000


class Ledger:
    """All that was ever used, by minute and by day: what a store must agree with, in another way of counting."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.minutes, self.days = Counter[int](), Counter[int]()
        self.running: list[Reservation] = []

    @property
    def room(self) -> bool:
        return len(self.running) < 3

    def weighted(self) -> float:
        minute, into = divmod(self.now.ms, MINUTE)
        return self.minutes[minute] + self.minutes[minute - 1] * (MINUTE - into) / MINUTE

    def today(self) -> int:
        return self.days[self.now.ms // DAY]

    def charge(self, minute: int, day: int, tokens: int) -> None:
        self.minutes[minute] += tokens
        self.days[day] += tokens


@given(start=st.sampled_from([NOON, MIDNIGHT - 90]), steps=STEPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_reserved_never_exceeds_a_limit_and_settling_gives_back_the_difference(store_of, start, steps) -> None:
    async def play() -> None:
        now = Now(start)
        ledger = Ledger(now)
        async with store_of(now) as store:
            for step, *values in steps:
                if step == "pass":
                    now.ms += values[0]
                    if isinstance(store, RedisStore):  # as a server does every 10 s
                        await store.renew(ledger.running)
                elif step == "reserve":
                    (tokens,) = values
                    fits = ledger.room and ledger.weighted() + tokens <= 100 and ledger.today() + tokens <= 150
                    answer = await store.reserve("team", LIMITS, tokens)
                    assert (answer.reservation is not None) == fits
                    assert fits or answer.standing.refusal(LIMITS, tokens)
                    if answer.reservation:
                        ledger.charge(now.ms // MINUTE, now.ms // DAY, tokens)
                        ledger.running.append(answer.reservation)
                    assert answer.standing.today == ledger.today()
                    assert answer.standing.running == len(ledger.running)
                    assert answer.standing.tokens.remaining(10**6) == int(10**6 - ledger.weighted())
                elif ledger.running:
                    number, used = values
                    reservation = ledger.running.pop(number % len(ledger.running))
                    await store.settle(reservation, used)
                    more = used - reservation.tokens
                    if more > 0:
                        ledger.charge(now.ms // MINUTE, now.ms // DAY, more)
                    else:
                        ledger.charge(reservation.minute, reservation.day, more)

    asyncio.run(play())


@in_a_loop
async def test_a_reservation_that_is_settled_twice_is_given_back_once(store_of) -> None:
    async with store_of(Now(NOON)) as store:
        await store.reserve("team", LIMITS, 50)
        reservation = (await store.reserve("team", LIMITS, 40)).reservation
        await store.settle(reservation, 0)
        await store.settle(reservation, 0)
        assert (await store.reserve("team", LIMITS, 1)).standing.today == 51


@in_a_loop
async def test_tokens_of_yesterday_are_not_given_back_today(store_of) -> None:
    now = Now(MIDNIGHT - 1)
    async with store_of(now) as store:
        reservation = (await store.reserve("team", LIMITS, 90)).reservation
        now.ms += 2000
        assert (await store.reserve("team", LIMITS, 5)).standing.today == 5
        await store.settle(reservation, 10)
        standing = (await store.reserve("team", LIMITS, 1)).standing
        assert (standing.today, standing.tokens.previous, standing.tokens.current) == (6, 10, 6)


@pytest.mark.parametrize(
    ("limits", "waits_ms"),
    [
        (TenantLimits(tokens_per_minute=100), 60_000),
        (TenantLimits(tokens_per_day=100), 43_200_000),
        (TenantLimits(requests_at_a_time=1), None),
    ],
)
@in_a_loop
async def test_each_limit_refuses_by_itself_until_its_time_has_passed(store_of, limits, waits_ms) -> None:
    now = Now(NOON)
    async with store_of(now) as store:
        first = (await store.reserve("team", limits, 100)).reservation
        assert first is not None
        for passed in (0, (waits_ms or 2) - 1):
            now.ms = int(NOON * 1000) + passed
            assert (await store.reserve("team", limits, 100)).reservation is None
        if waits_ms is None:
            await store.settle(first, 100)
        else:
            now.ms += 1 + waits_ms  # a whole minute, too: the tokens of the one before count in part
        assert (await store.reserve("team", limits, 100)).reservation


@in_a_loop
async def test_tenants_share_no_counter(store_of) -> None:
    async with store_of(Now(NOON)) as store:
        assert (await store.reserve("one", LIMITS, 100)).reservation
        assert (await store.reserve("one", LIMITS, 1)).reservation is None
        assert (await store.reserve("two", LIMITS, 100)).reservation


@in_a_loop
async def test_changed_limits_hold_for_the_next_request_with_what_was_used_before(store_of) -> None:
    async with store_of(Now(NOON)) as store:
        first = TenantLimits(requests_per_minute=2, tokens_per_minute=100)
        assert (await store.reserve("team", first, 60)).reservation
        less = TenantLimits(requests_per_minute=1, tokens_per_minute=50)
        refused = await store.reserve("team", less, 1)
        assert refused.reservation is None
        assert (refused.standing.requests_fit, refused.standing.tokens.remaining(50)) == (False, 0)
        more = TenantLimits(requests_per_minute=9, tokens_per_minute=200)
        standing = (await store.reserve("team", more, 100)).standing
        assert (standing.requests.remaining(9), standing.tokens.remaining(200)) == (7, 40)


@in_a_loop
async def test_requests_per_minute_are_counted_also_where_another_limit_refuses(store_of) -> None:
    limits = TenantLimits(requests_per_minute=3, tokens_per_minute=10)
    async with store_of(None) as store:
        answers = [await store.reserve("team", limits, 9) for _ in range(4)]
    assert [bool(answer.reservation) for answer in answers] == [True, False, False, False]
    assert [answer.standing.requests.remaining(3) for answer in answers] == [2, 1, 0, 0]
    refusal = answers[-1].standing.refusal(limits, 0)
    assert refusal is not None
    assert "3 requests per minute" in str(refusal)
    assert 1 <= refusal.retry_after_s <= 120


@in_a_loop
async def test_many_requests_at_once_do_not_exceed_a_limit(store_of) -> None:
    limits = TenantLimits(requests_per_minute=20, tokens_per_minute=50)
    async with store_of(None) as store:
        answers = await asyncio.gather(*(store.reserve("team", limits, 7) for _ in range(40)))
        assert sum(bool(answer.reservation) for answer in answers) == 7
        for answer in answers:
            if answer.reservation is None:
                assert answer.standing.refusal(limits, 7)


@in_a_loop
async def test_requests_of_a_replica_that_died_end_with_their_leases_and_renewed_ones_go_on(redis_url) -> None:
    now, limits = Now(NOON), TenantLimits(requests_at_a_time=2)
    async with RedisStore(redis_url, "leases", now) as living, RedisStore(redis_url, "leases", now) as died:
        mine = (await living.reserve("team", limits, 0)).reservation
        assert (await died.reserve("team", limits, 0)).reservation
        assert (await living.reserve("team", limits, 0)).reservation is None
        for _ in range(3):
            now.ms += LEASE_S * 400
            assert mine is not None
            await living.renew([mine])
        assert (await living.reserve("team", limits, 0)).reservation
        assert (await living.reserve("team", limits, 0)).reservation is None


@in_a_loop
async def test_replicas_of_one_base_share_counters_and_other_bases_do_not(redis_url) -> None:
    now = Now(NOON)
    async with (
        RedisStore(redis_url, "one", now) as first,
        RedisStore(redis_url, "one", now) as second,
        RedisStore(redis_url, "two", now) as other,
    ):
        assert (await first.reserve("team", LIMITS, 60)).standing.today == 60
        assert (await second.reserve("team", LIMITS, 40)).standing.today == 100
        assert (await other.reserve("team", LIMITS, 40)).standing.today == 40


@in_a_loop
async def test_the_time_is_that_of_redis_and_every_key_ends_by_itself(redis_url) -> None:
    limits = TenantLimits(requests_per_minute=5, tokens_per_minute=100, requests_at_a_time=2)
    async with RedisStore(redis_url, "expiring") as store:
        answer = await store.reserve("team", limits, 60)
        assert answer.reservation is not None
        seconds, _ = await store._client.time()
        assert abs(answer.reservation.minute - seconds // 60) <= 1
        keys = [key async for key in store._client.scan_iter("*expiring*")]
        assert len(keys) == 3
        for key in keys:
            assert b"team" in key
            assert 0 < await store._client.ttl(key) <= 86_400


@pytest.mark.parametrize("url", ["http://host", "redis://host:port", "nonsense"])
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ServeError, match="give one such as redis://") as refused:
        RedisStore(url.replace("//", "//user:hidden@"), "base")
    assert "hidden" not in str(refused.value)
