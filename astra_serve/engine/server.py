"""The HTTP servers: their sockets, bound before the model loads, and the orderly end of the public one.

SIGTERM or SIGINT: not ready, new requests get 503, those that run have `finish_s` seconds to end; a second signal ends
them at once. When a background task fails (the engine is lost), running requests get `FAILING_S` for their errors.
"""

import asyncio
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from vllm import envs
from vllm.entrypoints.launchers.launcher import NoSignalServer, setup_server
from vllm.entrypoints.launchers.utils import constants
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

from astra_serve.errors import ServeError
from astra_serve.gateway.connection import ConnectionLimits, limited
from astra_serve.gateway.middleware import App, Gateway

FAILING_S = 10.0  # for the errors of the requests that run when the engine is lost
SSL = ("keyfile", "certfile", "ca_certs", "cert_reqs", "ciphers")
SHUTTING_DOWN = "the server is shutting down"


@contextmanager
def bound(args: Namespace, *others: tuple[str, int] | None) -> Iterator[list[socket.socket | None]]:
    """Yield the sockets of the public port and of the `others`, which are hosts and ports, or None.

    Raises ServeError where one cannot be used.
    """
    sockets: list[socket.socket | None] = []
    try:
        where = args.uds or f"{args.host or ''}:{args.port}"
        try:
            sockets.append(setup_server(args, reuse_port=False)[1])
            for other in others:
                where = f"{other[0]}:{other[1]}" if other else ""
                sockets.append(_listen(*other) if other else None)
        except (OSError, KeyError) as error:  # a KeyError: an unknown parser, in vLLM's words
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number else str(error).strip("'\"")
            raise ServeError(f"cannot serve at {where}: {reason}") from error
        yield sockets
    finally:
        for sock in filter(None, sockets):
            sock.close()


def connection_limits(args: Namespace) -> ConnectionLimits:
    """Return the limits of connections to all ports; vLLM's options for h11 set two of them."""
    given = {
        "header_bytes": (args.h11_max_incomplete_event_size, constants.H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT),
        "header_count": (args.h11_max_header_count, constants.H11_MAX_HEADER_COUNT_DEFAULT),
    }
    return ConnectionLimits(**{name: value for name, (value, default) in given.items() if value not in (None, default)})


async def serve_beside(app: App, sock: socket.socket, limits: ConnectionLimits) -> None:
    """Serve the admin API or the policy port until cancelled; requests that run then have a second to end."""
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
    server = NoSignalServer(uvicorn.Config(app, http=limited(limits), **quiet, timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        await serving


async def serve(app: App, state: Any, args: Namespace, sock: socket.socket, gateway: Gateway, finish_s: float) -> None:
    """Serve `app` until a signal arrives and the requests that run have ended; `state` is that of vLLM's application.

    Raises ServeError where the server does not start. When this is cancelled, running requests get their errors first.
    """
    server, signalled, loop = _server(app, state, args), asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await _first({serving, asyncio.create_task(signalled.wait())})
        if signalled.is_set():
            signalled.clear()
            closing = asyncio.create_task(gateway.close(SHUTTING_DOWN, finish_s))
            await _first({closing, asyncio.create_task(signalled.wait())})
            if not closing.done():  # a second signal: now
                closing.cancel()
                server.force_exit = True
        else:
            raise ServeError("the HTTP server has ended by itself: its log says why")
    except asyncio.CancelledError:
        await gateway.close("the server has failed", FAILING_S)
        raise
    finally:
        server.should_exit = True
        await serving


async def _first(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def _server(app: App, state: Any, args: Namespace) -> NoSignalServer:
    config = uvicorn.Config(
        app,
        http=limited(connection_limits(args)),
        ws="none",  # a request for a WebSocket is answered as any other request: no such route is served
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=False,  # `observe.log` has a line for each request to a model
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=int(FAILING_S),  # the gateway has waited for the requests, unless the engine died
        **{f"ssl_{name}": getattr(args, f"ssl_{name}") for name in SSL},
        **({"log_config": found} if (found := get_uvicorn_log_config(args)) else {}),
    )
    config.load()
    if args.enable_ssl_refresh:
        state.ssl_refresher = SSLCertRefresher(config.ssl, args.ssl_keyfile, args.ssl_certfile, args.ssl_ca_certs)
    state.server = NoSignalServer(config)
    return state.server
