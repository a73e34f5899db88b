"""The use of tenants in Redis or Valkey, for all replicas of one base.

A tenant has a hash with its counters, and a sorted set with its running requests by the time at which each one counts
as ended: a replica that dies renews nothing any more, so that its requests are over after `LEASE_S`. One script looks
at all counters and reserves, another one settles. The time is that of Redis, so that clocks of replicas may differ.
Names of keys have the base and the tenant, and never an API key. `limits` counts the requests per minute beside that.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, Self

from limits.aio.storage import RedisStorage

from astra_serve.document.keys import TenantLimits
from astra_serve.errors import ServeError
from astra_serve.gateway.tenancy.quota.standing import DAY, EMPTY, MINUTE, Standing, Window
from astra_serve.gateway.tenancy.quota.store import Answer, Reservation, count_request, requests_of

LEASE_S = 30
TIMEOUT_S = 0.25  # of each call, and for a connection
CONNECTIONS = 64
NO_LIMIT = -1
# KEYS: the counters, the running requests. ARGV begins with the time in ms, or with nothing: then it is Redis's.
_NOW = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local minute, day = math.floor(now / 60000), math.floor(now / 86400000)
local kept = redis.call('HMGET', KEYS[1], 'minute', 'previous', 'current', 'day', 'today')
for i = 1, 5 do kept[i] = tonumber(kept[i]) or 0 end
local previous, current, today = kept[2], kept[3], kept[5]
if kept[1] ~= minute then previous, current = kept[1] == minute - 1 and current or 0, 0 end
if kept[4] ~= day then today = 0 end
local function keep()
  redis.call('HSET', KEYS[1], 'minute', minute, 'previous', previous, 'current', current, 'day', day, 'today', today)
  redis.call('PEXPIRE', KEYS[1], 86400000)
end
"""
# Then: id, tokens, milliseconds of the lease, 1 to reserve, the limits per minute, a day and at a time, or -1.
_RESERVE = f"""{_NOW}
local tokens, most, most_today, most_running =
  tonumber(ARGV[3]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local running = redis.call('ZCARD', KEYS[2])
local fits = ARGV[5] == '1'
  and (most < 0 or (current + tokens - most) * 60000 + previous * (60000 - now % 60000) <= 0)
  and (most_today < 0 or today + tokens <= most_today)
  and (most_running < 0 or running < most_running)
if fits then
  current, today, running = current + tokens, today + tokens, running + 1
  keep()
  redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[2])
  redis.call('PEXPIRE', KEYS[2], ARGV[4])
end
return {{fits and 1 or 0, now, previous, current, today, running}}
"""
# Then: id, tokens that were reserved, those that were used, the minute and the day of the reservation.
_SETTLE = f"""{_NOW}
if redis.call('ZREM', KEYS[2], ARGV[2]) == 0 then return end
local more = ARGV[4] - ARGV[3]
if more > 0 then
  current, today = current + more, today + more
else
  if tonumber(ARGV[5]) == minute then current = math.max(0, current + more) end
  if tonumber(ARGV[5]) == minute - 1 then previous = math.max(0, previous + more) end
  if tonumber(ARGV[6]) == day then today = math.max(0, today + more) end
end
keep()
"""
# Then: milliseconds of the leases, and ids. A lease that has ended too early, as when Redis has lost it, begins again.
_RENEW = f"""{_NOW}
for i = 3, #ARGV do redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
"""


class RedisStore:
    """The counters of all replicas."""

    def __init__(self, url: str, base: str, now: Callable[[], float] | None = None) -> None:
        """`base` is the name of the model: servers of another one count for themselves.

        `now` returns the seconds since 1970, for tests. Raises ServeError where the URL is no address of Redis, or its
        client is not installed; whether Redis is there is seen at the first call.
        """
        redis = _client_library()
        try:
            times = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "timeout": TIMEOUT_S}
            pool = redis.BlockingConnectionPool.from_url(url, max_connections=CONNECTIONS, **times)
        except ValueError as error:  # its message has no part of the URL
            example = "give one such as redis://limits:6379/0"
            raise ServeError(f"--limits-store is no address of Redis or Valkey ({error}): {example}") from error
        of_requests: dict[str, Any] = {"key_prefix": f"astra:{base}:requests", "connection_pool": pool}
        self._requests = RedisStorage("async+redis://", implementation="redispy", **of_requests)
        self._client, self._base, self._now = redis.Redis(connection_pool=pool), base, now
        self._reserve, self._settle, self._renew = map(self._client.register_script, (_RESERVE, _SETTLE, _RENEW))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def check(self) -> None:
        """Write a key, and run a script that finds nothing; raises an error of any kind where Redis does not do it.

        A replica that is read-only, a full memory or a user without rights would answer a mere ping.
        """
        await self._client.set(f"astra:{self._base}:checked", 1, ex=LEASE_S)
        await self._call(self._settle, "", "", 0, 0, 0, 0)

    async def reserve(self, tenant: str, limits: TenantLimits, tokens: int) -> Answer:
        """Admit a request if no limit is exceeded by it."""
        per_minute, fits = limits.requests_per_minute, True
        if per_minute is not None:
            fits = await count_request(self._requests, tenant, per_minute)
        wanted = Reservation(tenant, tokens, 0, 0)
        most = (limits.tokens_per_minute, limits.tokens_per_day, limits.requests_at_a_time)
        numbers = [tokens, LEASE_S * 1000, int(fits), *(NO_LIMIT if one is None else one for one in most)]
        counted = self._call(self._reserve, tenant, wanted.id, *numbers)
        if per_minute is None:
            row, requests = await counted, EMPTY
        else:
            row, requests = await asyncio.gather(counted, requests_of(self._requests, tenant))
        admitted, now, previous, current, today, running = map(int, row)
        window = Window(previous, current, MINUTE - now % MINUTE)
        standing = Standing(window, today, DAY - now % DAY, running, requests, fits)
        return Answer(standing, Reservation(tenant, tokens, now // MINUTE, now // DAY, wanted.id) if admitted else None)

    async def settle(self, reservation: Reservation, used: int) -> None:
        """End a request that has used so many tokens."""
        numbers = (reservation.tokens, used, reservation.minute, reservation.day)
        await self._call(self._settle, reservation.tenant, reservation.id, *numbers)

    async def renew(self, reservations: Collection[Reservation]) -> None:
        """Say that these requests still run: by LEASE_S from now the next time is due."""
        by_tenant: defaultdict[str, list[str]] = defaultdict(list)
        for reservation in reservations:
            by_tenant[reservation.tenant].append(reservation.id)
        for tenant, ids in by_tenant.items():
            await self._call(self._renew, tenant, LEASE_S * 1000, *ids)

    async def _call(self, script: Any, tenant: str, *values: str | int) -> Any:
        now = "" if self._now is None else int(self._now() * 1000)
        of_tenant = f"astra:{{{self._base}:{tenant}}}"  # what is in braces puts both keys on one node of a cluster
        return await script([f"{of_tenant}:used", f"{of_tenant}:running"], [now, *values])


def _client_library() -> Any:
    try:
        from redis import asyncio as redis
    except ImportError as error:
        raise ServeError("--limits-store needs the package redis: pip install 'astra-serve[redis]'") from error
    return redis
