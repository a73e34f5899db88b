"""A limit of the body of a request: by its Content-Length before it is read, and while it is read.

A body may pause for `pause_s`. After a refusal the connection is closed; what the client still sends is
dropped for at most `DROP_S`, because a client that is cut off while it sends does not see the answer.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from astra_serve.gateway.errors import error_body
from astra_serve.gateway.middleware import App, Message, Receive, Scope, Send

MIB = 2**20
MAX_BODY = 8 * MIB
MAX_BODY_MULTIMODAL = 64 * MIB  # pictures are sent as text
PAUSE_S = 60.0  # between two pieces of a body
DROP_S = 5.0  # for the rest of a body that was refused


class BodyLimit:
    """ASGI middleware that reads the whole body of a request before it hands the request on."""

    def __init__(
        self,
        app: App,
        most: int,
        fault: Callable[[bytes], str | None] = lambda _: None,
        pause_s: float = PAUSE_S,
        streamed: Callable[[Scope], bool] = lambda _: False,
    ) -> None:
        """`most` is in bytes; `fault` returns why a body is refused with 400, or None.

        A request that is `streamed` is handed on at once: its handler reads the body, with limits of its own.
        """
        self._app, self._most, self._fault, self._pause_s, self._streamed = app, most, fault, pause_s, streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on with its body, or refuse it with 400, 408 or 413."""
        if scope["type"] != "http" or self._streamed(scope):
            await self._app(scope, receive, send)
            return
        if length_of(scope) > self._most:
            await self._refuse(receive, send, True)
            return
        pieces, size, more = [], 0, True
        while more:
            try:
                async with asyncio.timeout(self._pause_s):
                    message = await receive()
            except TimeoutError:
                await _answer(send, 408, f"the body has paused for {self._pause_s:g} s")
                return
            if message["type"] == "http.disconnect":
                return
            pieces.append(message.get("body", b""))
            size, more = size + len(pieces[-1]), message.get("more_body", False)
            if size > self._most:
                pieces.clear()
                await self._refuse(receive, send, more)
                return
        body = b"".join(pieces)
        if fault := self._fault(body):
            await _answer(send, 400, fault)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _refuse(self, receive: Receive, send: Send, more: bool) -> None:
        most = f"{self._most / MIB:g} MiB" if self._most >= MIB else f"{self._most} bytes"
        await _answer(send, 413, f"the body is larger than {most}: send less in one request", more_body=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(DROP_S):
                while more:
                    more = (await receive()).get("more_body", False)
        await send({"type": "http.response.body", "body": b""})


def length_of(scope: Scope) -> int:
    """Return the length of a body by its Content-Length, 0 where the request has none."""
    value = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(value) if value.isdigit() else 0


async def _answer(send: Send, status: int, message: str, *, more_body: bool = False) -> None:
    body = error_body(status, message)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that has the whole body, and then what happens to the connection."""
    left = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return replay
