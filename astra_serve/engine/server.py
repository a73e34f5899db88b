"""The HTTP server around the engine, from its start to its orderly end."""

import asyncio
import signal
from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI
from vllm import envs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer, setup_server
from vllm.entrypoints.launchers.utils.constants import (
    H11_MAX_HEADER_COUNT_DEFAULT,
    H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT,
)
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from astra_serve.adapters.admission import base_name
from astra_serve.engine.vllm import VllmEngine
from astra_serve.errors import EngineLost, ServeError
from astra_serve.gateway.api_key import ApiKeys
from astra_serve.gateway.middleware import Gateway

PULSE_S = 0.5  # how soon it is seen that the engine is lost
FAILING_S = 10.0  # for its requests to get their errors then

# Starts what runs beside the HTTP server, given the engine and the application.
Start = Callable[[VllmEngine, FastAPI], Coroutine[Any, Any, Gateway]]


def serve(args: Namespace, start: Start, finish_s: float, patience_s: float) -> None:
    """Run engine and HTTP server, with what `start` makes of them, until SIGTERM or SIGINT.

    Requests that run then have `finish_s` seconds to end. Raises ServeError, and EngineLost, also when the engine has
    not answered for `patience_s` seconds.
    """
    uvloop.run(_serve(args, start, finish_s, patience_s))


async def serve_admin(app: FastAPI, host: str, port: int) -> None:
    """Serve the admin API until cancelled."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, lifespan="off")
    await NoSignalServer(config).serve()


async def _serve(args: Namespace, start: Start, finish_s: float, patience_s: float) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, interrupt)  # until the HTTP server runs
    _, sock = setup_server(args, reuse_port=False)
    try:
        async with build_async_engine_client(args) as client:
            tasks = await client.get_supported_tasks()
            app = build_app(args, tasks, client.model_config)
            if keys := [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]:
                known = AuthenticationMiddleware(app, keys).verify_token
                app.middleware_stack = ApiKeys(app.middleware_stack, known)
            await init_app_state(client, app.state, args, tasks)
            engine = VllmEngine(client, base_name(args.model), patience_s)
            losing = asyncio.create_task(_loss(engine))
            gateway = await _started(start(engine, app), engine, losing)
            await _answer(_server(app, args), sock, engine, gateway, losing, finish_s)
    finally:
        sock.close()


async def _started(start: Coroutine[Any, Any, Gateway], engine: VllmEngine, losing: asyncio.Task[str]) -> Gateway:
    """Return what `start` returns. Raises what it raises, and EngineLost where the engine is lost meanwhile."""
    starting = asyncio.create_task(start)
    await _first({starting, losing})
    if not starting.done():
        starting.cancel()
        raise _lost(losing.result())
    if (error := starting.exception()) and (reason := engine.lost()):
        raise _lost(reason) from error
    return starting.result()


def _lost(reason: str) -> EngineLost:
    return EngineLost(f"{reason}; start the server again")


async def _answer(
    server: NoSignalServer, sock: Any, engine: VllmEngine, gateway: Gateway, losing: asyncio.Task[str], finish_s: float
) -> None:
    """Answer requests until a signal comes or the engine is lost; then let those that run end, and the others know."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    await _first({serving, losing, asyncio.create_task(told.wait())})
    lost = losing.result() if losing.done() else engine.lost()  # vLLM may have ended `serving` for it
    lost = None if told.is_set() else lost
    if told.is_set():
        told.clear()
        closing = asyncio.create_task(gateway.close("the server is shutting down", finish_s))
        await _first({closing, losing, asyncio.create_task(told.wait())})
        if not closing.done():  # told again, or nobody is there to end what runs: now
            closing.cancel()
            server.force_exit = True
    elif lost:
        await gateway.close(lost, FAILING_S)
    server.should_exit = True
    await serving
    losing.cancel()
    if lost:
        raise _lost(lost)
    if not server.started:
        raise ServeError("the HTTP server did not start")


async def _first(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _loss(engine: VllmEngine) -> str:
    """Wait until the engine is lost, and return why it is."""
    before = None
    while not ((lost := engine.lost()) and before):  # twice: an answer may lie there when this process was frozen
        before = lost
        await asyncio.sleep(PULSE_S)
    return lost


def _server(app: FastAPI, args: Namespace) -> NoSignalServer:
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=False,  # `log` has a line for each request to a model
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=int(FAILING_S),  # the gateway has waited for what runs, unless the engine died
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        **({"log_config": found} if (found := get_uvicorn_log_config(args)) else {}),
    )
    config.h11_max_incomplete_event_size = args.h11_max_incomplete_event_size or H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT
    # vLLM's own, which its uvicorn reads
    config.h11_max_header_count = args.h11_max_header_count or H11_MAX_HEADER_COUNT_DEFAULT  # type: ignore[attr-defined]
    config.load()
    if args.enable_ssl_refresh:
        app.state.ssl_refresher = SSLCertRefresher(config.ssl, args.ssl_keyfile, args.ssl_certfile, args.ssl_ca_certs)
    app.state.server = NoSignalServer(config)
    return app.state.server
