"""Connections that send too much, or too slowly, to a real server on a socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from astra_serve.gateway.body import BodyLimit
from astra_serve.gateway.connection import ConnectionLimits, limited
from tests.astra_serve.gateway.test_gateway import body_of, say
from tests.astra_serve.world import in_a_loop

LIMITS = ConnectionLimits(header_bytes=2000, header_count=20, header_s=60)
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


@asynccontextmanager
async def serving(app: Any, limits: ConnectionLimits = LIMITS) -> AsyncIterator[Callable[..., Any]]:
    """Serve `app`, and yield a function that connects."""
    quiet: dict[str, Any] = {"log_level": "critical", "access_log": False, "lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, http=limited(limits), **quiet))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield lambda: asyncio.open_connection("127.0.0.1", port)
    finally:
        await server.shutdown()


async def length(_scope: Any, receive: Any, send: Any) -> None:
    await say(send, len(await body_of(receive)))


async def answer(connect: Any, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """Send a request, and return the status and the error of an answer after which the connection is closed."""
    reader, writer = await connect()
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "pieces",
    [
        (HEAD, *[b"x-%d: %s\r\n" % (n, 100 * b"y") for n in range(19)]),
        (HEAD, b"x: ", *[100 * b"y"] * 60),
        (b"GET /", *[100 * b"y"] * 60),
        (HEAD, *[b"x: y\r\n"] * 22),
        (HEAD, b"transfer-encoding: chunked\r\n\r\n1;x=", *[100 * b"y"] * 60),
        (HEAD, b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", *[b"x: y\r\n"] * 22),
        (HEAD, b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx: ", *[100 * b"y"] * 60),
    ],
    ids=["size", "one", "path", "count", "chunk-extension", "trailers", "trailer"],
)
@in_a_loop
async def test_headers_have_a_size_and_a_number(pieces: tuple[bytes, ...]) -> None:
    async with serving(length) as connect:
        status, error = await answer(connect, *pieces)
        assert (status, error["code"]) == (431, 431)
        assert "header" in error["message"]


@in_a_loop
async def test_a_request_within_the_limits_is_served_also_in_one_byte_pieces() -> None:
    body = b"x" * 50_000
    many = b"".join(b"1\r\nx\r\n" for _ in range(50_000))
    async with serving(length) as connect:
        reader, writer = await connect()
        for sent in (
            b"content-length: 50000\r\n\r\n" + body,
            b"transfer-encoding: chunked\r\n\r\n" + many + b"0\r\n\r\n",
        ):
            for byte in HEAD:
                writer.write(bytes([byte]))
            writer.write(sent)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert (await reader.readline()).strip() == b"5"
            assert b"50000" in await reader.readuntil(b"0\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"POST / HT", HEAD])
@in_a_loop
async def test_a_connection_without_a_whole_request_is_closed(sent: bytes) -> None:
    async with serving(length, ConnectionLimits(header_s=0.05)) as connect:
        reader, writer = await connect()
        writer.write(sent)
        got = await reader.read()
        assert (b" 408 " in got) == bool(sent)
        writer.close()


@in_a_loop
async def test_headers_that_arrive_byte_by_byte_have_no_more_time() -> None:
    async with serving(length, ConnectionLimits(header_s=0.05)) as connect:
        reader, writer = await connect()
        writer.write(HEAD + b"x")
        while not (reader.at_eof() or reader.exception()):
            writer.write(b"x")
            await asyncio.sleep(0.005)
        writer.close()


@in_a_loop
async def test_a_second_request_has_its_time_too_and_an_answer_that_takes_longer_is_not_cut() -> None:
    async def slow(_scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        await asyncio.sleep(0.2)
        await say(send, "whole")

    async with serving(slow, ConnectionLimits(header_s=0.05)) as connect:
        reader, writer = await connect()
        writer.write(HEAD + b"\r\n")
        assert b"whole" in await reader.readuntil(b"0\r\n\r\n")
        writer.write(HEAD)
        assert b" 408 " in await reader.read()
        writer.close()


@in_a_loop
async def test_a_body_that_no_handler_reads_does_not_keep_the_connection() -> None:
    async def unread(_scope: Any, _receive: Any, send: Any) -> None:
        await say(send, "refused")

    async with serving(unread, ConnectionLimits(header_s=0.1)) as connect:
        reader, writer = await connect()
        writer.write(HEAD + b"content-length: 1000000000\r\n\r\n")
        assert b"refused" in await reader.readuntil(b"0\r\n\r\n")
        while not (reader.at_eof() or reader.exception()):
            writer.write(1000 * b"x")
            await asyncio.sleep(0.001)
        writer.close()


@in_a_loop
async def test_what_is_no_request_gets_an_error_in_openais_form() -> None:
    async with serving(length) as connect:
        assert (await answer(connect, b"nonsense\r\n\r\n"))[1]["type"] == "BadRequestError"


@in_a_loop
async def test_a_body_over_the_limit_is_refused_by_its_length_or_while_it_is_read() -> None:
    chunk = b"3e8\r\n" + 1000 * b"x" + b"\r\n"
    async with serving(BodyLimit(length, 10_000)) as connect:
        for pieces in (
            [b"content-length: 10001\r\n\r\n"],
            [b"content-length: 10001\r\n\r\n", 10001 * b"x"],
            [b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 20, b"0\r\n\r\n"],
            [b"transfer-encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n" * 100] * 101, b"0\r\n\r\n"],
        ):
            status, error = await answer(connect, HEAD, *pieces, *([] if len(pieces) > 1 else [b"x" * 10001]))
            assert (status, error["type"]) == (413, "RequestTooLargeError")
        reader, writer = await connect()
        writer.write(HEAD + b"content-length: 10000\r\n\r\n" + 10_000 * b"x")
        assert b"10000" in await reader.readuntil(b"0\r\n\r\n")
        writer.close()


@in_a_loop
async def test_a_body_that_pauses_for_too_long_is_refused() -> None:
    async with serving(BodyLimit(length, 10_000, pause_s=0.05)) as connect:
        assert (await answer(connect, HEAD, b"content-length: 10\r\n\r\nx"))[0] == 408
