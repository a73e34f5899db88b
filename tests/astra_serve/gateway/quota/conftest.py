"""A real Redis server, and stores of limits over a clock that tests move."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from astra_serve.gateway.tenancy.quota.redis_store import RedisStore
from astra_serve.gateway.tenancy.quota.store import MemoryStore, Store
from tests.support.redis import SERVER, RedisServer

Stores = Callable[[Callable[[], float] | None], AbstractAsyncContextManager[Store]]


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if SERVER is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(params=["memory", "redis"])
def store_of(request: pytest.FixtureRequest) -> Stores:
    """Return what makes an empty store over a clock, which returns seconds since 1970."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None

    @asynccontextmanager
    async def make(now: Callable[[], float] | None) -> AsyncIterator[Store]:
        if url is None:
            yield MemoryStore(now) if now else MemoryStore()
            return
        async with RedisStore(url, "base", now) as store:
            await store._client.flushall()
            yield store

    return make
