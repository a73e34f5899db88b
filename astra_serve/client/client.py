"""Clients of one server's admin API, sync and async, which share `calls` and `exchange`.

    with Client("http://127.0.0.1:8001", token) as client:
        served = client.publish("sql", "./sql-lora")
        print(served.version.name, served.version.probe.effect)

Every method raises the error of the server (`errors`) with its line, Refused for a refusal that has no class of its
own, and NoAnswer where there is no answer within the time limit, 600 s by default.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx

from astra_serve.client import calls, exchange
from astra_serve.client.exchange import Call
from astra_serve.client.state import AdapterState, Event

DEFAULT_URL = "http://127.0.0.1:8001"
TIMEOUT_S = 600.0
POLL_S = 0.2

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(make: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    """Return the method of Client that makes a call."""

    def method(client: "Client", *args: P.args, **kwargs: P.kwargs) -> T:
        return client.ask(make(*args, **kwargs))

    return exchange.as_method(method, make)  # type: ignore[no-any-return]


def _awaited(make: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """Return the method of AsyncClient that makes a call."""

    async def method(client: "AsyncClient", *args: P.args, **kwargs: P.kwargs) -> T:
        return await client.ask(make(*args, **kwargs))

    return exchange.as_method(method, make)  # type: ignore[no-any-return]


class Client:
    """The admin API of one server. A context manager: its end closes the connections."""

    publish = _blocking(calls.publish)
    prepare = _blocking(calls.prepare)
    rollback = _blocking(calls.rollback)
    canary = _blocking(calls.canary)
    end_canary = _blocking(calls.end_canary)
    list = _blocking(calls.listing)
    get = _blocking(calls.get)
    remove = _blocking(calls.remove)
    pin = _blocking(calls.pin)
    unpin = _blocking(calls.unpin)
    unload = _blocking(calls.unload)
    refresh = _blocking(calls.refresh)
    events = _blocking(calls.events)
    rotation = _blocking(calls.rotation)
    drain = _blocking(calls.drain)
    undrain = _blocking(calls.undrain)
    usage = _blocking(calls.usage)

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`token` is by default that of the environment (ASTRA_ADMIN_TOKEN); `timeout_s` is for each answer.

        Raises ServeError for a URL or a token that makes no sense.
        """
        self.url = str(exchange.admin_url(url))
        headers = {"Authorization": f"Bearer {exchange.checked_token(token)}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, call: Call[T]) -> T:
        """Make a call of `calls`, and return its answer. Raises the errors of the module's docstring."""
        try:
            answer = self._http.request(**exchange.request(call), content=call.tar)
        except httpx.HTTPError as error:
            raise exchange.no_answer(self.url, error) from error
        return exchange.result(call, self.url, answer)

    def wait(self, name: str, digest: str | None = None, timeout_s: float = TIMEOUT_S) -> AdapterState:
        """Let the server read the document, and return the adapter once it serves; `digest` names the version.

        Raises NotPublished with the reason where it has failed, UnknownAdapter, BadDocument where the server does not
        follow the document as it is now, and NoAnswer after `timeout_s`.
        """
        end = time.monotonic() + timeout_s
        calls.check_followed(self.url, self.refresh())
        while not calls.serves(adapter := self.get(name), digest):
            if time.monotonic() > end:
                raise calls.late(self.url, name, digest, timeout_s)
            time.sleep(POLL_S)
        return adapter

    def follow(self) -> Iterator[Event]:
        """Yield the newest events, and then each one as it happens; ends with NoAnswer when the server ends."""
        try:
            with self._http.stream(**exchange.FOLLOW, timeout=None) as answer:
                if not answer.is_success:
                    answer.read()
                    raise exchange.refused(self.url, answer)
                for line in answer.iter_lines():
                    yield exchange.event(line)
        except httpx.HTTPError as error:
            raise exchange.no_answer(self.url, error) from error


class AsyncClient:
    """As Client, for asyncio."""

    publish = _awaited(calls.publish)
    prepare = _awaited(calls.prepare)
    rollback = _awaited(calls.rollback)
    canary = _awaited(calls.canary)
    end_canary = _awaited(calls.end_canary)
    list = _awaited(calls.listing)
    get = _awaited(calls.get)
    remove = _awaited(calls.remove)
    pin = _awaited(calls.pin)
    unpin = _awaited(calls.unpin)
    unload = _awaited(calls.unload)
    refresh = _awaited(calls.refresh)
    events = _awaited(calls.events)
    rotation = _awaited(calls.rotation)
    drain = _awaited(calls.drain)
    undrain = _awaited(calls.undrain)
    usage = _awaited(calls.usage)

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As that of Client."""
        self.url = str(exchange.admin_url(url))
        headers = {"Authorization": f"Bearer {exchange.checked_token(token)}"}
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout_s, transport=transport)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, call: Call[T], timeout_s: float | None = None) -> T:
        """As Client.ask; `timeout_s` is by default the client's."""
        limit = self._http.timeout if timeout_s is None else httpx.Timeout(timeout_s)
        content = call.tar.pieces() if call.tar else None
        try:
            answer = await self._http.request(**exchange.request(call), content=content, timeout=limit)
        except httpx.HTTPError as error:
            raise exchange.no_answer(self.url, error) from error
        return exchange.result(call, self.url, answer)

    async def wait(self, name: str, digest: str | None = None, timeout_s: float = TIMEOUT_S) -> AdapterState:
        """As Client.wait."""
        end = time.monotonic() + timeout_s
        calls.check_followed(self.url, await self.refresh())
        while not calls.serves(adapter := await self.get(name), digest):
            if time.monotonic() > end:
                raise calls.late(self.url, name, digest, timeout_s)
            await asyncio.sleep(POLL_S)
        return adapter

    async def follow(self) -> AsyncIterator[Event]:
        """As Client.follow."""
        try:
            async with self._http.stream(**exchange.FOLLOW, timeout=None) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise exchange.refused(self.url, answer)
                async for line in answer.aiter_lines():
                    yield exchange.event(line)
        except httpx.HTTPError as error:
            raise exchange.no_answer(self.url, error) from error
