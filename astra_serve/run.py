"""The server put together: engine, store, fleet, reconciliation, gateway, admin API, metrics and log.

A request passes the limits of its connection, the API key, the limit of its body, vLLM's and the operator's middleware,
the gateway (which checks what the request asks for, asks its tenant's quota, leases a version, and waits for a place in
the engine), and vLLM's handlers. On the policy port a token takes the place of the API key. Beside the HTTP servers
run: the loop of the engine's memory, the reconciler, the housekeeping, the followers of the documents, the writer of
the usage ledger and the watch over the engine. If one of them fails, the server ends with status 1 and its reason.
"""

import asyncio
import socket
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvloop
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY
from starlette.routing import Route

from astra_serve.adapters.admission import Base
from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Events
from astra_serve.adapters.fetch import Sources, local_path
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.loading import Loader
from astra_serve.adapters.progress import FetchLimits, largest_adapter
from astra_serve.adapters.residency import Residency
from astra_serve.adapters.schedule import Limits
from astra_serve.adapters.store import Store, first_free
from astra_serve.adapters.templates import Templates
from astra_serve.adapters.upload_target import UploadTarget
from astra_serve.control import admin, policy_port
from astra_serve.control.control import Control
from astra_serve.control.desired_state import DesiredState
from astra_serve.control.housekeeping import Housekeeping
from astra_serve.control.policies import Policies
from astra_serve.control.preparation import Preparation
from astra_serve.control.readiness import RequiredAdapters
from astra_serve.control.reconcile import Reconciler
from astra_serve.control.status import Phase
from astra_serve.control.tenant_keys import TenantKeys
from astra_serve.control.uploads import Uploads
from astra_serve.document.desired import Document
from astra_serve.engine import server, vllm, vllm_seams
from astra_serve.errors import EngineLost, ServeError
from astra_serve.gateway.body import MAX_BODY, MAX_BODY_MULTIMODAL, BodyLimit
from astra_serve.gateway.middleware import App, Receive, Scope, Send, Subscribers
from astra_serve.gateway.tenancy.authentication import Authentication
from astra_serve.gateway.tenancy.keyring import Keyring
from astra_serve.gateway.tenancy.quota.failover import Failover
from astra_serve.gateway.tenancy.quota.redis_store import RedisStore
from astra_serve.gateway.tenancy.quota.station import Quota
from astra_serve.gateway.tenancy.quota.store import MemoryStore
from astra_serve.gateway.tenancy.station import Station, Stations, open_to_all
from astra_serve.observe import log, usage
from astra_serve.observe.ledger import Ledger
from astra_serve.observe.ledger_file import LedgerFile
from astra_serve.observe.metrics import Metrics
from astra_serve.observe.tenants import TenantMetrics
from converter.errors import first_line


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server beside those of vLLM."""

    document: Document | str  # a fixed one, or where it is: a file or a URL
    store: Path
    store_shared: bool  # with other servers: each uses a folder in it
    resident: int  # adapters in the engine's memory at a time
    drain_s: float
    engine_timeout_s: float
    roots: tuple[Path, ...]  # the folders that local adapters must be in; none: anywhere
    admin: tuple[str, int] | None  # host and port
    admin_token: str
    policies: tuple[str, int] | None  # host and port of the policy port
    policy_token: str
    upload_to: UploadTarget | None  # where published bytes are copied to; None: they are refused
    keys: str | None  # where the keys document is: a file or a URL; None: there are no tenants
    max_body: int | None  # bytes of a request's body; None: as large as the base needs
    limits_store: RedisStore | None  # None: each server counts the use of limits for itself


def serve(args: Namespace, base: Base, settings: Settings) -> None:
    """Run until SIGTERM or SIGINT; `args` are vLLM's.

    Raises ServeError where a port or the store cannot be used, or a fixed adapter fails; EngineLost
    when the engine has died, or another part of the server.
    """
    keyring = Keyring(vllm_seams.take_keys(args), follows=settings.keys is not None)  # before vLLM prints its arguments
    with ExitStack() as stack:
        sockets = stack.enter_context(server.bound(args, settings.admin, settings.policies))
        store = first_free(settings.store) if settings.store_shared else Store(settings.store)
        stack.callback(store.close)
        passing = store.passing() if settings.policies else None
        if passing:
            stack.callback(passing.close)
        if settings.upload_to:
            settings.upload_to.sweep()
        try:
            uvloop.run(_serve(args, base, settings, keyring, (store, passing), sockets))
        except ExceptionGroup as group:
            error = _first(group.subgroup(ServeError) or group)
            if isinstance(error, ServeError):
                raise error from None
            log.logger.exception("a part of the server has failed")
            raise EngineLost(f"a part of the server has failed: {first_line(error)}") from error


async def _serve(
    args: Namespace,
    base: Base,
    settings: Settings,
    keyring: Keyring,
    stores: tuple[Store, Store | None],
    sockets: list[socket.socket | None],
) -> None:
    """Serve; `stores` are the lasting one and that of policies, `sockets` of the public, admin and policy ports."""
    (store, passing), (public, for_admin, for_policies) = stores, sockets
    assert public is not None
    clock, events = Clock(), Events()
    async with vllm.started(args, settings.engine_timeout_s, clock) as engine, Templates() as templates:
        loader = Loader(engine, store, base, events, clock, passing)
        residency = Residency(loader, events, Limits(settings.resident), clock)
        fleet = Fleet(base.name, residency, events)
        document = local_path(settings.document) if isinstance(settings.document, str) else None
        limits = FetchLimits(max_bytes=largest_adapter(base.shapes, base.max_rank))
        sources = Sources(limits, document.absolute().parent if document else None)
        preparation = Preparation(fleet, store, clock, settings.roots, sources)
        reconciler = Reconciler(fleet, preparation, clock, settings.drain_s)
        subscribers = Subscribers()
        place = vllm_seams.places(engine.client).place if keyring.follows else open_to_all
        tenancy = _tenancy(settings, keyring, place, events, clock, sources)
        app, gateway = await vllm_seams.application(
            engine.client, args, fleet, subscribers, templates, tenancy.stations
        )
        housekeeping = Housekeeping(fleet, store, preparation, reconciler, clock)
        ledger = Ledger(LedgerFile(store.root), fleet, clock)
        work = [engine.watch, residency.run, reconciler.run, housekeeping.run, ledger.run]
        work += [part.run for part in (tenancy.keys, tenancy.limits) if part]
        control = None

        def not_ready() -> list[str]:
            parts = [part for part in (gateway, engine, tenancy.keys, control) if part]
            return [reason for part in parts for reason in part.not_ready()]

        if isinstance(settings.document, str):
            required = RequiredAdapters(fleet, reconciler)
            state = DesiredState(settings.document, sources)
            control = Control(state, fleet, store, preparation, reconciler, required, clock)
            work.append(control.run)
            if for_admin:
                uploads = Uploads(control, store, sources, settings.upload_to)
                admin_app = admin.build(control, gateway, settings.admin_token, uploads)
                admin_app.include_router(usage.for_operators(ledger))
                _add_health(admin_app, not_ready)
                admin_app.router.routes.append(Route("/metrics", _Page(app, "/metrics")))
                work.append(partial(server.serve_beside, admin_app, for_admin, server.connection_limits(args)))

        metrics = Metrics(fleet, reconciler, gateway, REGISTRY, not_ready, control, tenancy.faults())
        subscribers.first_token.append(metrics.first_token)
        subscribers.ended.extend([metrics.count, log.request, ledger.count])
        if keyring.follows:
            subscribers.ended.append(TenantMetrics(REGISTRY, keyring.tenants).count)
        events.subscribers.extend([metrics.note, log.event])
        log.protect()
        _add_health(app, not_ready, reasons=not keyring.follows)
        usage.for_tenants(app, ledger)
        multimodal = engine.client.model_config.is_multimodal_model
        limited = BodyLimit(app, settings.max_body or (MAX_BODY_MULTIMODAL if multimodal else MAX_BODY))
        if for_policies and passing:
            proved = Preparation(fleet, passing, clock, settings.roots, sources, urgent=True)
            policies = Policies(fleet, proved, passing, clock, most=settings.resident, drain_s=settings.drain_s)
            info = vllm_seams.server_info(engine.client)
            for_trainers = policy_port.build(policies, limited, info, settings.policy_token)
            beside = partial(server.serve_beside, for_trainers, for_policies, server.connection_limits(args))
            work += [policies.run, beside]
        async with ledger, asyncio.TaskGroup() as background:
            tasks = [background.create_task(one()) for one in work]
            if isinstance(settings.document, Document):
                await _serve_all(reconciler, settings.document)
            await server.serve(Authentication(limited, keyring), app.state, args, public, gateway, settings.drain_s)
            for task in tasks:
                task.cancel()


@dataclass(frozen=True)
class _Tenancy:
    """The parts of a server that know its tenants."""

    keys: TenantKeys | None  # with --keys
    limits: Failover | None  # with --limits-store
    stations: Stations

    def faults(self) -> dict[str, Callable[[], str | None]]:
        """Return for each part, by its name among the metrics, why it does not work as it should, if so."""
        parts = {"keys": self.keys, "limits_store": self.limits}
        return {name: partial(getattr, part, "fault") for name, part in parts.items() if part}


def _tenancy(
    settings: Settings, keyring: Keyring, place: Station, events: Events, clock: Clock, sources: Sources
) -> _Tenancy:
    """Return the follower of the keys document, and the stations of the gateway."""
    keys = TenantKeys(settings.keys, keyring, events, clock, sources) if settings.keys else None
    own = MemoryStore()
    shared = Failover(settings.limits_store, own, events, clock) if settings.limits_store else None
    return _Tenancy(keys, shared, Stations(Quota(shared or own).station, place))


async def _serve_all(reconciler: Reconciler, document: Document) -> None:
    """Serve a document that does not change. Raises ServeError where one of its adapters fails."""
    for entry in document.adapters:
        reconciler.want(entry)
    for entry in document.adapters:
        status = await reconciler.outcome(entry.name)
        if status and status.phase is Phase.FAILED:
            raise ServeError(f"adapter {entry.name!r}: {status.reason}")


def _add_health(app: FastAPI, not_ready: Callable[[], list[str]], *, reasons: bool = True) -> None:
    """Add /livez and /readyz; tenants do not see the `reasons`, which name adapters."""

    async def livez() -> JSONResponse:
        return JSONResponse({"alive": True})

    async def readyz() -> JSONResponse:
        found = not_ready()
        shown = {"reasons": found} if reasons else {}
        return JSONResponse({"ready": not found, **shown}, status_code=503 if found else 200)

    app.add_api_route("/livez", livez, methods=["GET"], include_in_schema=False)
    app.add_api_route("/readyz", readyz, methods=["GET"], include_in_schema=False)


class _Page:
    """One page of an application, as an application of its own; a class, because a route takes a function otherwise."""

    def __init__(self, app: App, path: str) -> None:
        self._app, self._path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "path": self._path, "root_path": ""}, receive, send)


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
