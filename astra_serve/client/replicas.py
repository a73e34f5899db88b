"""Several servers over one document, each at its own admin port, and the differences between them."""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from astra_serve.errors import ServeError

ANSWER_S = 30.0  # for requests that change nothing
NONE = {"name": "none", "digest": ""}  # stands for no version
Result = TypeVar("Result")


@dataclass(frozen=True)
class Replica:
    """One server's admin port."""

    name: str
    client: httpx.AsyncClient
    patience_s: float = ANSWER_S

    async def adapters(self) -> dict[str, Any]:
        """Return its description of all adapters, and of the document. Raises ServeError."""
        return self._content(await self._ask("GET", "/adapters"), "adapters", "document")

    async def adapter(self, name: str) -> dict[str, Any] | None:
        """Return its description of an adapter; None where it has none of this name. Raises ServeError."""
        answer = await self._ask("GET", f"/adapters/{name}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return self._content(answer, "state", "version")

    async def prepare(self, name: str, wanted: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Let it prove the version that `wanted` describes, and return its description. Raises ServeError."""
        return self._content(await self._ask("PUT", f"/prepared/{name}", wanted, timeout_s), "name", "digest", "probe")

    async def refresh(self) -> dict[str, Any]:
        """Let it read the document, and return its description of the document. Raises ServeError."""
        return self._content(await self._ask("POST", "/refresh"), "where", "digest", "fault")

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> httpx.Response:
        try:
            return await self.client.request(method, path, json=body, timeout=timeout_s or self.patience_s)
        except httpx.HTTPError as error:
            raise ServeError(f"{self.name} does not answer: {str(error) or type(error).__name__}") from error

    def _content(self, answer: httpx.Response, *expected: str) -> dict[str, Any]:
        """Return the content of an answer, which has the `expected` keys. Raises ServeError that names the replica."""
        if not answer.is_success:
            raise ServeError(f"{self.name}: {_reason(answer)}")
        try:
            content = dict(answer.json())
        except (ValueError, TypeError):
            content = {}
        if not content.keys() >= set(expected):
            raise ServeError(f"{self.name} does not answer as an admin port of this version of astra-serve does")
        return content


def _reason(answer: httpx.Response) -> str:
    """Return the reason of a refusal: the server's, if it is an admin port."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"it answers with {answer.status_code}: is it the admin port, of this version of astra-serve?"


@asynccontextmanager
async def connect(urls: Iterable[str], token: str, timeout_s: float = ANSWER_S) -> AsyncIterator[list[Replica]]:
    """Yield a replica for each of `urls`; for a host with several addresses one for each address.

    An answer may take `timeout_s` seconds, at most ANSWER_S. Raises ServeError where there is no URL, or no address.
    """
    async with AsyncExitStack() as open_clients:
        found = []
        for name in dict.fromkeys(one for url in urls for one in _each(url)):
            client = httpx.AsyncClient(base_url=name, headers={"Authorization": f"Bearer {token}"})
            client = await open_clients.enter_async_context(client)
            found.append(Replica(name, client, min(timeout_s, ANSWER_S)))
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


async def status(replicas: Sequence[Replica], expected: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Let each replica read the document, and return the descriptions of the document and of the adapters.

    `drift` has a line for each difference from the document, from each other and from the `expected` digests.
    """

    async def one(replica: Replica) -> dict[str, Any]:
        try:
            await replica.refresh()
            answer = await replica.adapters()
        except ServeError as error:
            return {"replica": replica.name, "fault": str(error), "document": None, "adapters": []}
        return {
            "replica": replica.name,
            "fault": None,
            "document": answer["document"],
            "adapters": answer["adapters"],
        }

    found = await of_all(replicas, one)
    return {"replicas": found, "drift": list(_drift(found, expected or {}))}


def _drift(found: Sequence[dict[str, Any]], expected: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each difference from the document, between replicas, and from the expected digests."""
    yield from (one["fault"] for one in found if one["fault"])
    there = {one["replica"]: one for one in found if not one["fault"]}
    for replica, one in there.items():
        if one["document"]["fault"]:
            yield f"{replica} does not follow the document as it is now: {one['document']['fault']}"
    texts = {replica: (one["document"]["digest"] or "unread")[:19] for replica, one in there.items()}
    yield from _differ("the document", texts)
    for replica, one in there.items():
        for adapter in one["adapters"]:
            if adapter["state"] != "serving":
                reason = f": {adapter['reason']}" if adapter["reason"] else ""
                serves = (adapter["version"] or NONE)["name"]
                yield f"{replica}: {adapter['name']} is {adapter['state']}, serves {serves}{reason}"
    served = {replica: dict(_versions(one["adapters"])) for replica, one in there.items()}
    for name in dict.fromkeys(name for versions in served.values() for name in versions):
        yield from _differ(name, {replica: versions.get(name, NONE)["name"] for replica, versions in served.items()})
    for name, digest in expected.items():
        for replica, versions in served.items():
            if versions.get(name, NONE)["digest"] != digest:
                yield f"{replica}: {name} is not {digest} yet"


def _versions(adapters: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the version of each name, and its canary."""
    for adapter in adapters:
        if adapter["version"]:
            yield adapter["name"], adapter["version"]
        if adapter.get("canary"):
            yield f"the canary of {adapter['name']}", adapter["canary"]


def _differ(what: str, by_replica: Mapping[str, str]) -> Iterator[str]:
    groups = [
        f"{value} at {', '.join(replica for replica, other in by_replica.items() if other == value)}"
        for value in dict.fromkeys(by_replica.values())
    ]
    if len(groups) > 1:
        yield f"{what} differs: {'; '.join(groups)}"


def admin_url(url: str) -> httpx.URL:
    """Return the URL of an admin port. Raises ServeError, which shows none of what may be a secret."""
    if "@" in url or "?" in url:
        raise ServeError("a URL of an admin port is http://HOST:PORT: the token comes from the environment")
    try:
        found = httpx.URL(url.rstrip("/"))
        named = bool(found.host)
    except (httpx.InvalidURL, ValueError) as error:  # a host that no name can be is a ValueError
        raise ServeError(f"{url} is no URL: {error}") from error
    if found.scheme not in ("http", "https") or not named:
        raise ServeError(f"{url} is no URL of an admin port: http://HOST:PORT")
    return found


def _each(url: str) -> list[str]:
    """Return `url` for each address of its host: a headless Service's are its pods'. Raises ServeError."""
    found = admin_url(url)
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
