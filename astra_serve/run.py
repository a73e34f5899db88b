"""The server put together: store, fleet, reconciliation, gateway, admin API, metrics, log, and the engine."""

import asyncio
from argparse import Namespace
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY

from astra_serve.adapters.admission import Base
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store, first_free
from astra_serve.control import admin
from astra_serve.control.control import TIMER_S, Control
from astra_serve.control.reconcile import Reconciler
from astra_serve.document.desired import Document
from astra_serve.engine import server
from astra_serve.engine import vllm as engine
from astra_serve.errors import ServeError
from astra_serve.gateway.middleware import Gateway
from astra_serve.observe import log
from astra_serve.observe.metrics import Metrics


@dataclass(frozen=True)
class Settings:
    """What the server serves beside the base, and how it is administered."""

    document: Document | str  # a fixed one, or where it is: a file or a URL
    store: Path
    store_shared: bool  # with other servers: each takes a folder in it
    resident: int  # adapters in the engine's memory at a time
    drain_s: float
    engine_timeout_s: float
    roots: tuple[Path, ...]
    admin_host: str
    admin_port: int | None
    admin_token: str


def serve(args: Namespace, base: Base, settings: Settings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises ServeError where the store cannot be used, or a fixed adapter fails; EngineLost when the engine has died.
    """
    store = first_free(settings.store) if settings.store_shared else Store(settings.store)
    running: set[asyncio.Task[None]] = set()

    async def start(vllm: engine.VllmEngine, app: FastAPI) -> Gateway:
        fleet = Fleet(vllm, store, base, settings.resident)
        reconciler = Reconciler(fleet, store, drain_s=settings.drain_s, roots=settings.roots)
        gateway = Gateway(fleet)
        document = settings.document
        control = Control(document, fleet, reconciler) if isinstance(document, str) else None

        def not_ready() -> list[str]:
            return [
                *gateway.not_ready(),
                *vllm.not_ready(),
                *(control.not_ready() if control else []),
                *reconciler.not_ready(),
            ]

        metrics = Metrics(fleet, reconciler, gateway, REGISTRY, not_ready, control)
        gateway.answering.append(metrics.first_token)
        gateway.ended += [metrics.count, log.request]
        fleet.journal.readers += [metrics.note, log.event]
        vllm.install(app, fleet, gateway)
        _add_health(app, not_ready)
        _keep(running, _tend(fleet, reconciler))
        if control is None:
            assert isinstance(document, Document)
            await reconciler.serve_all(document)
            return gateway
        _keep(running, control.follow())
        if settings.admin_port is not None and settings.admin_token:
            admin_app = admin.build(control, gateway, settings.admin_token)
            _keep(running, server.serve_admin(admin_app, settings.admin_host, settings.admin_port))
        return gateway

    try:
        server.serve(args, start, settings.drain_s, settings.engine_timeout_s)
    finally:
        store.close()


def _add_health(app: FastAPI, not_ready: Callable[[], list[str]]) -> None:
    async def livez() -> JSONResponse:
        return JSONResponse({"alive": True})

    async def readyz() -> JSONResponse:
        reasons = not_ready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, status_code=503 if reasons else 200)

    app.add_api_route("/livez", livez, methods=["GET"], include_in_schema=False)
    app.add_api_route("/readyz", readyz, methods=["GET"], include_in_schema=False)


async def _tend(fleet: Fleet, reconciler: Reconciler) -> None:
    while True:
        await asyncio.sleep(TIMER_S)
        with suppress(ServeError):  # an engine that is silent is not ready, and at last lost
            await fleet.places.look()
        try:
            reconciler.tend()
        except Exception:  # as a full disk: the next time may be better
            log.logger.exception("the server's timer failed")


def _keep(running: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    running.add(task)
    task.add_done_callback(running.discard)
