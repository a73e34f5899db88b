"""Several servers over one document, each at its own admin port, and the differences between them."""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from astra_serve.client import calls, exchange
from astra_serve.client.client import AsyncClient
from astra_serve.client.exchange import Call
from astra_serve.client.state import AdapterState, DocumentState, VersionState
from astra_serve.errors import NoAnswer, ServeError, UnknownAdapter

ANSWER_S = 30.0  # for requests that change nothing
Result = TypeVar("Result")


@dataclass(frozen=True)
class Replica:
    """One server's admin port."""

    client: AsyncClient
    patience_s: float = ANSWER_S

    @property
    def name(self) -> str:
        """Return its URL."""
        return self.client.url

    async def ask(self, call: Call[Result], timeout_s: float | None = None) -> Result:
        """Return its answer to a call. Raises ServeError, which names it."""
        try:
            return await self.client.ask(call, timeout_s or self.patience_s)
        except NoAnswer:  # which names it
            raise
        except ServeError as error:
            raise ServeError(f"{self.name}: {error}") from error

    async def adapter(self, name: str) -> AdapterState | None:
        """Return the state of an adapter; None where it has none of this name. Raises ServeError."""
        try:
            return await self.ask(calls.get(name))
        except ServeError as error:
            if isinstance(error.__cause__, UnknownAdapter):
                return None
            raise


@dataclass(frozen=True)
class ReplicaState:
    """One replica's document and adapters; `fault` is the reason if it does not answer."""

    replica: str
    fault: str | None
    document: DocumentState | None
    adapters: tuple[AdapterState, ...] = ()


@dataclass(frozen=True)
class ReplicasState:
    """The state of each replica, and a line for each difference."""

    replicas: tuple[ReplicaState, ...]
    drift: tuple[str, ...]


@asynccontextmanager
async def connect(urls: Iterable[str], token: str, timeout_s: float = ANSWER_S) -> AsyncIterator[list[Replica]]:
    """Yield a replica for each of `urls`; for a host with several addresses one for each address.

    An answer may take `timeout_s` seconds, at most ANSWER_S. Raises ServeError where there is no URL, or no address.
    """
    async with AsyncExitStack() as open_clients:
        found = []
        for name in dict.fromkeys(one for url in urls for one in _each(url)):
            client = await open_clients.enter_async_context(AsyncClient(name, token))
            found.append(Replica(client, min(timeout_s, ANSWER_S)))
        if not found:
            raise ServeError("there is no URL of an admin port: give --url")
        yield found


async def of_all(
    replicas: Sequence[Replica], work: Callable[[Replica], Coroutine[Any, Any, Result]], *, fail_fast: bool = False
) -> list[Result]:
    """Return the results of `work` with each replica, at the same time, in the order of the replicas.

    Raises ServeError with all failures; with `fail_fast` at the first failure, and the other works are cancelled.
    """
    tasks = [asyncio.create_task(work(replica)) for replica in replicas]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION if fail_fast else asyncio.ALL_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    if wrong := [str(error) for error in found if isinstance(error, ServeError)]:
        raise ServeError("; ".join(wrong))
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return [one for one in found if not isinstance(one, BaseException)]


async def status(replicas: Sequence[Replica], expected: Mapping[str, str] | None = None) -> ReplicasState:
    """Let each replica read the document, and return the states of the document and of the adapters.

    `drift` has a line for each difference from the document, from each other and from the `expected` digests.
    """

    async def one(replica: Replica) -> ReplicaState:
        try:
            await replica.ask(calls.refresh())
            found = await replica.ask(calls.listing())
        except ServeError as error:
            return ReplicaState(replica.name, str(error), None)
        return ReplicaState(replica.name, None, found.document, found.adapters)

    found = await of_all(replicas, one)
    return ReplicasState(tuple(found), tuple(_drift(found, expected or {})))


def _drift(found: Sequence[ReplicaState], expected: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each difference from the document, between replicas, and from the expected digests."""
    yield from (one.fault for one in found if one.fault)
    documents = {one.replica: one.document for one in found if one.document}
    for replica, document in documents.items():
        if document.fault:
            yield f"{replica} does not follow the document as it is now: {document.fault}"
    texts = {replica: (document.digest or "unread")[:19] for replica, document in documents.items()}
    yield from _differ("the document", texts)
    there = {one.replica: one.adapters for one in found if not one.fault}
    for replica, adapters in there.items():
        for adapter in adapters:
            if adapter.state != "serving":
                reason = f": {adapter.reason}" if adapter.reason else ""
                serves = adapter.version.name if adapter.version else "none"
                yield f"{replica}: {adapter.name} is {adapter.state}, serves {serves}{reason}"
    served = {replica: dict(_versions(adapters)) for replica, adapters in there.items()}
    for name in dict.fromkeys(name for versions in served.values() for name in versions):
        shown = {replica: versions[name].name if name in versions else "none" for replica, versions in served.items()}
        yield from _differ(name, shown)
    for name, digest in expected.items():
        for replica, versions in served.items():
            if name not in versions or versions[name].digest != digest:
                yield f"{replica}: {name} is not {digest} yet"


def _versions(adapters: Iterable[AdapterState]) -> Iterator[tuple[str, VersionState]]:
    """Yield the version of each name, and its canary."""
    for adapter in adapters:
        if adapter.version:
            yield adapter.name, adapter.version
        if adapter.canary:
            yield f"the canary of {adapter.name}", adapter.canary


def _differ(what: str, by_replica: Mapping[str, str]) -> Iterator[str]:
    groups = [
        f"{value} at {', '.join(replica for replica, other in by_replica.items() if other == value)}"
        for value in dict.fromkeys(by_replica.values())
    ]
    if len(groups) > 1:
        yield f"{what} differs: {'; '.join(groups)}"


def _each(url: str) -> list[str]:
    """Return `url` for each address of its host: a headless Service's are its pods'. Raises ServeError."""
    found = exchange.admin_url(url)
    try:
        ipaddress.ip_address(found.host)
        return [str(found)]
    except ValueError:
        pass
    try:
        addresses = socket.getaddrinfo(found.host, found.port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ServeError(f"{found}: {getattr(error, 'strerror', None) or error}") from error
    family = min(family for family, *_ in addresses)  # a pod with an address of either kind is one replica
    hosts = sorted({str(address[0]) for kind, *_, address in addresses if kind == family})
    if len(hosts) == 1:
        return [str(found)]
    if found.scheme == "https":
        raise ServeError(
            f"{found} has {len(hosts)} addresses, and its certificate is the name's: give each its own URL"
        )
    return [str(found.copy_with(host=host)) for host in hosts]
