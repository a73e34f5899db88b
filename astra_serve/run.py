"""The server put together: store, fleet, reconciliation, admin API, and the engine in the middle."""

import asyncio
from argparse import Namespace
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from astra_serve import admin, engine
from astra_serve.admission import Base
from astra_serve.control import Control
from astra_serve.desired import Document
from astra_serve.fleet import Fleet
from astra_serve.reconcile import Reconciler
from astra_serve.store import Store


@dataclass(frozen=True)
class Settings:
    """What the server serves beside the base, and how it is administered."""

    document: Document | str  # a fixed one, or where it is: a file or a URL
    store: Path
    resident: int  # adapters in the engine's memory at a time
    drain_s: float
    roots: tuple[Path, ...]
    admin_host: str
    admin_port: int | None
    admin_token: str | None


def serve(args: Namespace, base: Base, settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises ServeError where the store cannot be used, or a fixed adapter fails."""
    store = Store(settings.store)
    running: set[asyncio.Task[None]] = set()

    async def start(vllm: engine.VllmEngine, app: FastAPI) -> Fleet:
        fleet = Fleet(vllm, store, settings.resident)
        reconciler = Reconciler(fleet, vllm, store, base, drain_s=settings.drain_s, roots=settings.roots)
        _add_health(app, reconciler)
        if isinstance(settings.document, Document):
            await reconciler.serve_all(settings.document)
            return fleet
        control = Control(settings.document, fleet, reconciler)
        _keep(running, control.follow())
        if settings.admin_port is not None and settings.admin_token:
            admin_app = admin.build(control, settings.admin_token)
            _keep(running, engine.serve_admin(admin_app, settings.admin_host, settings.admin_port))
        return fleet

    try:
        engine.serve(args, start)
    finally:
        store.close()


def _add_health(app: FastAPI, reconciler: Reconciler) -> None:
    async def livez() -> JSONResponse:
        return JSONResponse({"alive": True})

    async def readyz() -> JSONResponse:
        reasons = reconciler.ready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, status_code=503 if reasons else 200)

    app.add_api_route("/livez", livez, methods=["GET"], include_in_schema=False)
    app.add_api_route("/readyz", readyz, methods=["GET"], include_in_schema=False)


def _keep(running: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    running.add(task)
    task.add_done_callback(running.discard)
