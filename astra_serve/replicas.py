"""Several servers over one document, each asked at its own admin port, and where they differ."""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from astra_serve.errors import ServeError

ANSWER_S = 30.0  # for whatever is not brought up for the answer
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
        try:
            answer = await self.client.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise ServeError(f"{self.name} does not answer: {str(error) or type(error).__name__}") from error
        try:
            content = answer.json()
        except ValueError as error:
            raise ServeError(f"{self.name} answers with {answer.status_code}: is it the admin port?") from error
        if not answer.is_success:
            reason = content.get("error", {}).get("message") or content.get("detail", content)
            raise ServeError(f"{self.name}: {reason}")
        return dict(content)


@asynccontextmanager
async def connect(urls: Iterable[str], token: str) -> AsyncIterator[list[Replica]]:
    """Yield a replica for each of `urls`, and of a host that has several addresses for each of those.

    Raises ServeError where a host has none.
    """
    async with AsyncExitStack() as open_clients:
        found = []
        for name in dict.fromkeys(one for url in urls for one in _each(url.rstrip("/"))):
            client = httpx.AsyncClient(base_url=name, headers={"Authorization": f"Bearer {token}"})
            found.append(Replica(name, await open_clients.enter_async_context(client)))
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


async def status(replicas: Sequence[Replica]) -> dict[str, Any]:
    """Return what each replica says of its adapters and the document, and as `drift` every way in which they differ."""

    async def one(replica: Replica) -> dict[str, Any]:
        try:
            return {"replica": replica.name, "fault": None, **await replica.ask("GET", "/adapters")}
        except ServeError as error:
            return {"replica": replica.name, "fault": str(error), "document": None, "adapters": []}

    found = await of_all(replicas, one)
    return {"replicas": found, "drift": list(_drift(found))}


def _drift(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for everything that is not as the document says, or not the same everywhere."""
    lines = [one["fault"] for one in found if one["fault"]]
    there = [one for one in found if not one["fault"]]
    for one in there:
        if one["document"]["fault"]:
            lines.append(f"{one['replica']} does not follow the document as it is now: {one['document']['fault']}")
    lines += _differ("the document", {one["replica"]: one["document"]["digest"] or "unread" for one in there})
    for one in there:
        for adapter in one["adapters"]:
            if adapter["state"] != "serving":
                served = f"serves {adapter['version']['name']}" if adapter["version"] else "serves none"
                reason = f": {adapter['reason']}" if adapter["reason"] else ""
                lines.append(f"{one['replica']}: {adapter['name']} is {adapter['state']}, {served}{reason}")
    by_name = {one["replica"]: {a["name"]: a["version"] for a in one["adapters"] if a["version"]} for one in there}
    for name in dict.fromkeys(name for served in by_name.values() for name in served):
        names = {replica: served[name]["name"] if name in served else "none" for replica, served in by_name.items()}
        lines += _differ(name, names)
    return lines


def _differ(what: str, by_replica: dict[str, str]) -> list[str]:
    if len(set(by_replica.values())) < 2:
        return []
    groups = [
        f"{value[:19]} at {', '.join(replica for replica, other in by_replica.items() if other == value)}"
        for value in dict.fromkeys(by_replica.values())
    ]
    return [f"{what} differs: {'; '.join(groups)}"]


def _each(url: str) -> list[str]:
    """Return `url` for each address of its host: a headless Service's are its pods'. Raises ServeError."""
    parts = httpx.URL(url)
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ServeError(f"{url} is no URL of an admin port: http://HOST:PORT")
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
