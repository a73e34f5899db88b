"""Several servers over one document, each asked at its own admin port, and where they differ."""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from astra_serve.errors import ServeError, without_secrets

ANSWER_S = 30.0  # for whatever is not brought up for the answer
NONE = {"name": "none", "digest": ""}  # the version where there is none
Result = TypeVar("Result")


@dataclass(frozen=True)
class Replica:
    """One server's admin port."""

    name: str
    client: httpx.AsyncClient

    async def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = ANSWER_S
    ) -> dict[str, Any]:
        """Return what it answers. Raises ServeError with its name, where that is no success."""
        return self._content(await self._answer(method, path, body, timeout_s))

    async def adapter(self, name: str) -> dict[str, Any] | None:
        """Return what it says of an adapter; None where it has none of this name. Raises ServeError."""
        answer = await self._answer("GET", f"/adapters/{name}", None, ANSWER_S)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return self._content(answer)

    async def refresh(self) -> dict[str, Any]:
        """Let it read the document, and return what it says of that. Raises ServeError where it does not follow it."""
        document = await self.ask("POST", "/refresh")
        if document.get("fault"):
            raise ServeError(f"{self.name} does not follow the document as it is now: {document['fault']}")
        return document

    async def _answer(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> httpx.Response:
        try:
            return await self.client.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ServeError(f"{self.name} does not answer: {str(error) or type(error).__name__}") from error

    def _content(self, answer: httpx.Response) -> dict[str, Any]:
        if not answer.is_success:
            raise ServeError(f"{self.name}: {_reason(answer)}")
        try:
            return dict(answer.json())
        except (ValueError, TypeError) as error:
            raise ServeError(f"{self.name} says what no admin port says: is it one?") from error


def _reason(answer: httpx.Response) -> str:
    """Return why a server refused, in its own words where they are those of an admin port."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"it answers with {answer.status_code}: is it the admin port, of this version of astra-serve?"


@asynccontextmanager
async def connect(urls: Iterable[str], token: str) -> AsyncIterator[list[Replica]]:
    """Yield a replica for each of `urls`, and of a host that has several addresses for each of those.

    Raises ServeError where there is none, or a host has none.
    """
    async with AsyncExitStack() as open_clients:
        found = []
        for name in dict.fromkeys(one for url in urls for one in _each(url.rstrip("/"))):
            client = httpx.AsyncClient(base_url=name, headers={"Authorization": f"Bearer {token}"})
            found.append(Replica(name, await open_clients.enter_async_context(client)))
        if not found:
            raise ServeError("there is no URL of an admin port: give --url")
        yield found


async def of_all(replicas: Sequence[Replica], work: Callable[[Replica], Awaitable[Result]]) -> list[Result]:
    """Return what `work` makes of each, in their order, at the same time. Raises ServeError with all that is wrong."""
    found = await asyncio.gather(*map(work, replicas), return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, ServeError):
            raise error
    if wrong := [str(error) for error in found if isinstance(error, ServeError)]:
        raise ServeError("; ".join(wrong))
    return [one for one in found if not isinstance(one, BaseException)]


async def status(replicas: Sequence[Replica], expected: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Let each replica look at the document, and return what it says of that and of its adapters.

    `drift` are all ways in which they differ from the document, from each other and from the `expected` digests.
    """

    async def one(replica: Replica) -> dict[str, Any]:
        try:
            await replica.ask("POST", "/refresh")
            answer = await replica.ask("GET", "/adapters")
            return {
                "replica": replica.name,
                "fault": None,
                "document": answer["document"],
                "adapters": answer["adapters"],
            }
        except ServeError as error:
            fault = str(error)
        except KeyError:
            fault = f"{replica.name} says what no admin port of this version says"
        return {"replica": replica.name, "fault": fault, "document": None, "adapters": []}

    found = await of_all(replicas, one)
    return {"replicas": found, "drift": list(_drift(found, expected or {}))}


def _drift(found: Sequence[dict[str, Any]], expected: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for everything that is not as the document says, not the same everywhere, or not as expected."""
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
    served = {
        replica: {adapter["name"]: adapter["version"] for adapter in one["adapters"] if adapter["version"]}
        for replica, one in there.items()
    }
    for name in dict.fromkeys(name for versions in served.values() for name in versions):
        yield from _differ(name, {replica: versions.get(name, NONE)["name"] for replica, versions in served.items()})
    for name, digest in expected.items():
        for replica, versions in served.items():
            if versions.get(name, NONE)["digest"] != digest:
                yield f"{replica}: {name} is not {digest} yet"


def _differ(what: str, by_replica: Mapping[str, str]) -> Iterator[str]:
    groups = [
        f"{value} at {', '.join(replica for replica, other in by_replica.items() if other == value)}"
        for value in dict.fromkeys(by_replica.values())
    ]
    if len(groups) > 1:
        yield f"{what} differs: {'; '.join(groups)}"


def _each(url: str) -> list[str]:
    """Return `url` for each address of its host: a headless Service's are its pods'. Raises ServeError."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ServeError(f"{without_secrets(url)} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ServeError(f"{without_secrets(url)} is no URL of an admin port: http://HOST:PORT")
    if parts.userinfo:
        raise ServeError(f"{without_secrets(url)} had credentials in it: the token comes from the environment")
    try:
        ipaddress.ip_address(parts.host)
        return [url]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(parts.host, parts.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServeError(f"{url}: {error.strerror or error}") from error
    family = min(family for family, *_ in found)  # a pod with an address of either kind is one replica
    hosts = sorted({str(address[0]) for kind, *_, address in found if kind == family})
    if len(hosts) == 1 or parts.scheme == "https":  # a certificate is the name's
        return [url]
    return [str(parts.copy_with(host=host)) for host in hosts]
