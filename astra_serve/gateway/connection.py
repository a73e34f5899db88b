"""Limits of a connection while uvicorn parses it: without them it accepts headers without end, and waits without end.

- `header_bytes`: of a request line and its headers, and between two pieces of a body (chunk extensions, trailers);
- `header_count`: of headers, trailers included;
- `header_s`: from the connection, or the first byte of a later request, to the end of the headers; and from an answer
  to the end of the body that was not read. A connection that stays idle after an answer is closed by uvicorn's own
  `timeout_keep_alive`.

A connection over a limit is closed, after an error in OpenAI's format unless an answer has begun. vLLM's own limits are
settings of h11, which uvicorn does not use where httptools is installed.
"""

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from astra_serve.gateway.errors import error_body

LINGER_S = 1.0


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of a connection, as above."""

    header_bytes: int = 64 * 2**10
    header_count: int = 256
    header_s: float = 30.0


def limited(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return the protocol for uvicorn's setting `http`."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"limits": limits})


class _LimitedProtocol(HttpToolsProtocol):
    limits: ConnectionLimits

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._unparsed = 0  # bytes since the parser has last completed headers, or found a piece of a body
        self._headed = False  # the headers of the present request are complete
        self._complete = True  # the present request is complete, or there is none
        self._refused = False  # the answer is sent, and what the client still sends is dropped
        self._fault: tuple[int, str] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self._refused and not self.transport.is_closing():
            room = self.limits.header_bytes - self._unparsed + 1
            piece, data = data[:room], data[room:]
            self._unparsed += len(piece)
            super().data_received(piece)
            if self._unparsed > self.limits.header_bytes:
                self._refuse(431, f"the request's headers have more than {self.limits.header_bytes} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headed = self._complete = False
        if self._deadline is None:
            self._arm()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > self.limits.header_count:
            self._fault = (431, f"the request has more than {self.limits.header_count} headers")
            raise ValueError(self._fault[1])  # the parser stops, and `send_400_response` follows

    def on_headers_complete(self) -> None:
        self._unparsed, self._headed = 0, True
        self._disarm()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed, self._complete = 0, True
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._complete and not self.pipeline:
            self._arm()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*(self._fault or (400, msg)))

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: the request is answered as one without an upgrade."""

    def _arm(self) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(self.limits.header_s, self._late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._complete or self._refused:  # no byte of a request was received, or the client has its answer
            self.transport.close()
        else:
            self._refuse(408, f"the request was not complete after {self.limits.header_s:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Close the connection, after an error where no other answer is being sent.

        A client that is cut off while it sends does not see the error: `LINGER_S` passes in between.
        """
        if self.transport.is_closing():
            return
        if self.pipeline or not self._unanswered():
            self.transport.close()
            return
        body = error_body(status, message)
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():  # not with TLS
            self.transport.write_eof()
        self._refused = True
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._disarm()
        self._deadline = self.loop.call_later(LINGER_S, self._late)

    def _unanswered(self) -> bool:
        """Return whether the present request has no answer yet, and the request before it is answered."""
        if self.cycle is None:
            return True
        return not self.cycle.response_started if self._headed else self.cycle.response_complete
