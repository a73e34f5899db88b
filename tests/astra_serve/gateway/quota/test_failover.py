"""Limits while a real Redis is killed, and when it is back."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest

from astra_serve.adapters.events import Events
from astra_serve.document.keys import TenantLimits
from astra_serve.gateway.tenancy.quota.failover import TICK_S, Failover
from astra_serve.gateway.tenancy.quota.redis_store import LEASE_S, RedisStore
from astra_serve.gateway.tenancy.quota.store import MemoryStore
from tests.astra_serve.world import ManualClock, in_a_loop, running
from tests.support.redis import SERVER, RedisServer

LIMITS = TenantLimits(tokens_per_minute=100, tokens_per_day=10_000, requests_at_a_time=2)


@dataclass
class Replica:
    store: Failover
    redis: RedisStore
    clock: ManualClock
    events: Events

    def seen(self) -> list[str]:
        return [event.event for event in self.events.newest]

    async def becomes(self, *, faulty: bool) -> None:
        """Let the store look for Redis until it is as expected."""
        while bool(self.store.fault) != faulty:
            await self.clock.advance(TICK_S)
            await asyncio.sleep(0.01)  # for the answer of another process


@pytest.fixture
def server(tmp_path) -> Iterator[RedisServer]:
    if SERVER is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with RedisServer(tmp_path) as found:
        yield found


@pytest.fixture
def replica(server) -> Callable[[], AbstractAsyncContextManager[Replica]]:
    @asynccontextmanager
    async def make() -> AsyncIterator[Replica]:
        redis, clock, events = RedisStore(server.url, "base"), ManualClock(), Events()
        store = Failover(redis, MemoryStore(), events, clock)
        async with running(store):
            yield Replica(store, redis, clock, events)

    return make


@in_a_loop
async def test_while_redis_is_away_each_replica_counts_for_itself_and_says_so_once(server, replica) -> None:
    async with replica() as one, replica() as other:
        assert (await one.store.reserve("team", LIMITS, 80)).reservation
        assert (await other.store.reserve("team", LIMITS, 80)).reservation is None
        server.kill()
        for each in (one, other):
            answers = await asyncio.gather(*(each.store.reserve("team", LIMITS, 80) for _ in range(5)))
            assert sum(bool(answer.reservation) for answer in answers) == 1
            assert each.seen() == ["limits_store_failed"]
            assert each.store.fault


@in_a_loop
async def test_when_redis_is_back_its_counters_hold_again(server, replica) -> None:
    async with replica() as one, replica() as other:
        server.kill()
        away = (await one.store.reserve("team", LIMITS, 80)).reservation
        server.start()
        for each in (one, other):
            await each.becomes(faulty=False)
        assert one.seen() == ["limits_store_failed", "limits_store_recovered"]
        assert (await other.store.reserve("team", LIMITS, 70)).reservation
        assert (await one.store.reserve("team", LIMITS, 70)).reservation is None
        assert away is not None
        await one.store.settle(away, 0)  # counted in memory, and given back there
        assert (await one.store.reserve("team", LIMITS, 30)).standing.today == 100


@in_a_loop
async def test_requests_that_end_while_redis_does_not_answer_are_settled_when_it_does(server, replica) -> None:
    async with replica() as one, replica() as other:
        first, second = [(await one.store.reserve("team", LIMITS, 50)).reservation for _ in range(2)]
        assert (await other.store.reserve("team", LIMITS, 1)).standing.running == 2
        server.pause()
        await one.store.settle(first, 10)
        await one.store.settle(second, 0)
        assert one.store.fault
        server.resume()
        for each in (one, other):  # the other one has met the pause, too, if it has looked for Redis in it
            await each.becomes(faulty=False)
        standing = (await other.store.reserve("team", LIMITS, 1)).standing
        assert (standing.today, standing.running) == (11, 1)


@in_a_loop
async def test_only_the_first_request_waits_for_a_redis_that_does_not_answer(server, replica) -> None:
    async with replica() as one:
        await one.store.reserve("team", LIMITS, 1)
        server.pause()
        begun = time.perf_counter()
        for _ in range(200):
            await one.store.reserve("team", LIMITS, 0)
        taken = time.perf_counter() - begun
        server.resume()
        assert one.seen() == ["limits_store_failed"]
        assert taken < 5  # one time-out of 0.25 s, and not 200 of them


@in_a_loop
async def test_a_redis_that_is_away_at_the_start_is_no_error_and_its_password_is_in_no_event(tmp_path) -> None:
    if SERVER is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    address = RedisServer(tmp_path).url.replace("//", "//:hidden@")
    clock, events = ManualClock(), Events()
    store = Failover(RedisStore(address, "base"), MemoryStore(), events, clock)
    async with running(store):
        while not store.fault:
            await asyncio.sleep(0.01)
        assert (await store.reserve("team", LIMITS, 80)).reservation
    (event,) = events.newest
    assert (event.adapter, event.event) == ("", "limits_store_failed")
    assert "hidden" not in (event.reason or "")


@in_a_loop
async def test_a_redis_that_answers_and_cannot_be_written_is_away(server, replica) -> None:
    async with replica() as one:
        await one.redis._client.replicaof("127.0.0.1", server.port)  # of itself, which it never reaches
        assert await one.redis._client.ping()
        assert (await one.store.reserve("team", LIMITS, 80)).reservation
        for _ in range(5):
            await one.clock.advance(TICK_S)
            await asyncio.sleep(0.02)
        assert one.seen() == ["limits_store_failed"]
        await one.redis._client.replicaof("NO", "ONE")
        await one.becomes(faulty=False)


@in_a_loop
async def test_leases_of_running_requests_are_renewed(replica) -> None:
    async with replica() as one:
        await one.store.reserve("team", LIMITS, 1)
        key = "astra:{base:team}:running"
        ((_, before),) = await one.redis._client.zrange(key, 0, -1, withscores=True)
        await asyncio.sleep(0.02)  # of Redis's clock, in whole milliseconds
        await one.clock.advance(LEASE_S / 3)
        after = before
        while after == before:
            await asyncio.sleep(0.01)
            ((_, after),) = await one.redis._client.zrange(key, 0, -1, withscores=True)
        assert after > before
