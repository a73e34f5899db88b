"""In front of vLLM's handlers: a request's `model` is resolved once, and its version held until the last byte.

The handlers look adapters up in a mapping (`Served`). It holds nothing but the lease of the request that asks: whatever
happens to the alias meanwhile, a request finds the version that it was admitted with.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from astra_serve.errors import Unavailable
from astra_serve.fleet import Fleet, Version

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_held: ContextVar[tuple[str, Version] | None] = ContextVar("held", default=None)  # model as it was asked for


class Served(Mapping[str, Any]):
    """The adapter of the running request under the name that it asked for; empty for everybody else."""

    def __getitem__(self, model: str) -> Any:
        held = _held.get()
        if held is None or held[0] != model:
            raise KeyError(model)
        return held[1].handle

    def __iter__(self) -> Iterator[str]:
        held = _held.get()
        return iter(() if held is None else (held[0],))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Leases:
    """ASGI middleware that holds the version which a JSON request's `model` means."""

    def __init__(self, app: App, fleet: Fleet) -> None:
        self._app, self._fleet = app, fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body, replay = await _read(receive)
        content = _content(body)
        model, user = content.get("model"), content.get("user")
        if content.get("priority"):  # the engine's priorities are for its probes: callers wait for each other's turn
            await _refuse(send, 400, "priority is not served: leave it out", "priority")
            return
        if not isinstance(model, str):
            await self._app(scope, replay, send)  # the handler says what is wrong
            return
        try:
            async with self._fleet.lease(model, _caller(scope, user if isinstance(user, str) else "")) as version:
                token = _held.set(None if version is None else (model, version))
                try:
                    await self._app(scope, replay, send)
                finally:
                    _held.reset(token)
        except Unavailable as error:
            await _refuse(send, 503, str(error), "model", error.retry_after_s)


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """Return the whole body, and a `receive` that gives it again before it goes on with what comes later."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)
    left = iter(messages)

    async def replay() -> Message:
        message = next(left, None)
        return await receive() if message is None else message

    return body, replay


def _content(body: bytes) -> dict[str, Any]:
    """Return a JSON body; an empty one where it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _caller(scope: Scope, user: str) -> str:
    """Return who asks, for a canary: the user that the request names, otherwise its API key's hash or its address."""
    if user:
        return user
    key = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    if key:
        return hashlib.sha256(key).hexdigest()
    return str((scope.get("client") or ("",))[0])


async def _refuse(send: Send, status: int, message: str, param: str, retry_after_s: int | None = None) -> None:
    kind = {400: "BadRequestError", 503: "ServiceUnavailableError"}[status]
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
