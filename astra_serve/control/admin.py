"""The admin API: what operators and their tools may do, on a port of its own, with a token.

GET    /adapters                      all, with state and versions; where the document is, and what is wrong with it
GET    /adapters/{name}
PUT    /adapters/{name}               {"source", "digest"?, "required"?, "pin"?, "allow_no_effect"?}  until it serves
DELETE /adapters/{name}
POST   /adapters/{name}/alias         {"version"}: name@digest-prefix, or sha256:...
POST   /adapters/{name}/unload        out of the engine's memory; its next request loads it again
POST   /adapters/{name}/rollback      {"digest"?}
POST   /adapters/{name}/canary        {"source", "weight"}, or {} to end it
POST   /adapters/{name}/pin, /unpin
PUT    /prepared/{name}               the same: the engine proves its version, and no name means it by that
POST   /refresh                       read the document now
GET    /events                        what happened, oldest first; ?follow=true: JSON lines, as it happens
GET    /requests                      how many run; POST /drain: not ready from now on; DELETE /drain: ready again
POST   /v1/load_lora_adapter, /v1/unload_lora_adapter    as vLLM's, onto the same lifecycle
"""

import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from astra_serve.control.control import Control
from astra_serve.control.reconcile import Status
from astra_serve.document import desired
from astra_serve.document.desired import Canary, Digest
from astra_serve.errors import ServeError, Unavailable
from astra_serve.gateway.middleware import Gateway
from converter.adapter_dir import AdapterError


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Publish(_Body):
    """What to serve under a name."""

    source: str = Field(min_length=1)
    digest: Digest | None = None
    required: bool | None = None
    pin: bool | None = None
    allow_no_effect: bool | None = None


class AliasOf(_Body):
    """The version that a name is to mean."""

    version: str = Field(min_length=1)


class Rollback(_Body):
    """Which version to go back to; by default the one before."""

    digest: Digest | None = None


class CanaryChange(_Body):
    """A version that gets a share of the requests; nothing to end it."""

    source: str | None = None
    weight: float | None = Field(default=None, gt=0, lt=1)


class VllmLoad(_Body):
    """vLLM's own request."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class VllmUnload(_Body):
    """vLLM's own request."""

    lora_name: str
    lora_int_id: int | None = None


def build(control: Control, gateway: Gateway, token: str) -> FastAPI:
    """Return the admin application; every request needs `Authorization: Bearer TOKEN`."""

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "the admin token is missing or wrong")

    app = FastAPI(dependencies=[Depends(authorised)], openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(HTTPException)
    async def _openai_error(_: Request, error: HTTPException) -> JSONResponse:
        kind = {401: "AuthenticationError", 404: "NotFoundError"}.get(error.status_code, "BadRequestError")
        body = {"message": str(error.detail), "type": kind, "param": None, "code": error.status_code}
        return JSONResponse({"error": body}, status_code=error.status_code)

    app.include_router(_looking(control))
    app.include_router(_changing(control))
    app.include_router(_moving(control))
    app.include_router(_as_vllm(control))
    app.include_router(_draining(gateway))
    return app


def _looking(control: Control) -> APIRouter:
    router = APIRouter()

    async def look() -> None:
        with suppress(ServeError):  # what was known before is shown
            await control.fleet.places.look()

    @router.get("/adapters")
    async def all_adapters() -> dict[str, Any]:
        await look()
        adapters = [describe(control, name) for name in control.reconciler.status]
        return {"adapters": adapters, "document": control.document()}

    @router.get("/adapters/{name}")
    async def adapter(name: str) -> dict[str, Any]:
        if name not in control.reconciler.status:
            raise HTTPException(404, f"there is no adapter {name!r}")
        await look()
        return describe(control, name)

    @router.get("/events", response_model=None)
    async def events(follow: bool = False) -> dict[str, Any] | StreamingResponse:
        if not follow:
            return {"events": [asdict(event) for event in control.fleet.journal.events]}

        async def lines() -> AsyncIterator[str]:
            async for event in control.fleet.journal.follow():
                yield json.dumps(asdict(event)) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @router.post("/refresh")
    async def refresh() -> dict[str, Any]:
        await control.refresh()
        return control.document()

    return router


def _changing(control: Control) -> APIRouter:
    """What changes the document."""
    router = APIRouter()

    @router.put("/adapters/{name}")
    async def publish(name: str, body: Publish) -> dict[str, Any]:
        settings = body.model_dump(exclude={"source"}, exclude_none=True)
        return await _done(control, name, control.publish(name, body.source, **settings))

    @router.delete("/adapters/{name}")
    async def remove(name: str) -> dict[str, Any]:
        return await _removed(control, name)

    @router.post("/adapters/{name}/rollback")
    async def rollback(name: str, body: Rollback | None = None) -> dict[str, Any]:
        return await _done(control, name, control.rollback(name, body.digest if body else None))

    @router.post("/adapters/{name}/canary")
    async def canary(name: str, body: CanaryChange) -> dict[str, Any]:
        if (body.source is None) != (body.weight is None):
            raise HTTPException(400, "a canary needs a source and a weight; give neither to end it")
        found = Canary(version=body.source, weight=body.weight).model_dump() if body.source and body.weight else None
        return await _done(control, name, control.change(name, canary=found))

    @router.post("/adapters/{name}/pin")
    async def pin(name: str) -> dict[str, Any]:
        return await _done(control, name, control.change(name, pin=True))

    @router.post("/adapters/{name}/unpin")
    async def unpin(name: str) -> dict[str, Any]:
        return await _done(control, name, control.change(name, pin=False))

    @router.post("/adapters/{name}/alias")
    async def alias(name: str, body: AliasOf) -> dict[str, Any]:
        digest = body.version
        if not digest.startswith("sha256:"):
            version = control.fleet.resolve(digest)
            if version is None:
                raise HTTPException(404, f"there is no version {digest!r}")
            digest = version.digest
        return await _done(control, name, control.publish(name, digest, digest=digest))

    return router


def _moving(control: Control) -> APIRouter:
    """What changes where versions are, and not what names mean."""
    router = APIRouter()

    @router.post("/adapters/{name}/unload")
    async def unload(name: str) -> dict[str, Any]:
        if name not in control.fleet.aliases:
            raise HTTPException(404, f"there is no adapter {name!r}")
        if control.reconciler.status[name].entry.pin:
            raise HTTPException(409, f"{name!r} is pinned: unpin it first")
        for version in list(control.fleet.aliases[name].versions()):
            await control.fleet.places.unload(version)
        return describe(control, name)

    @router.put("/prepared/{name}")
    async def prepare(name: str, body: Publish) -> dict[str, Any]:
        with _refused(name):
            entry = desired.entry({"name": name, **body.model_dump(exclude_none=True)})
        try:
            version = await control.reconciler.prepare(entry)
        except Unavailable as error:
            raise HTTPException(422, f"{name!r} was not prepared: {error.__cause__ or error}") from error
        except (ServeError, AdapterError, OSError) as error:
            raise HTTPException(422, f"{name!r} was not prepared: {error}") from error
        return control.reconciler.record(version)

    return router


def _as_vllm(control: Control) -> APIRouter:
    """vLLM's own two calls, onto the same lifecycle."""
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load(body: VllmLoad) -> dict[str, Any]:
        return await _done(control, body.lora_name, control.publish(body.lora_name, body.lora_path))

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: VllmUnload) -> dict[str, Any]:
        return await _removed(control, body.lora_name)

    return router


def _draining(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/requests")
    async def requests() -> dict[str, Any]:
        return {"drained": gateway.drained, "running": len(gateway.running)}

    @router.post("/drain")
    async def drain() -> dict[str, Any]:
        gateway.drained = True
        return await requests()

    @router.delete("/drain")
    async def undrain() -> dict[str, Any]:
        gateway.drained = False
        return await requests()

    return router


async def _done(control: Control, name: str, change: Awaitable[Status]) -> dict[str, Any]:
    """Wait for a change of an adapter, and return what is known of it then."""
    with _refused(name):
        status = await change
    if status.state == "failed":
        raise HTTPException(422, f"{name!r} was not published: {status.reason}")
    return describe(control, name)


async def _removed(control: Control, name: str) -> dict[str, Any]:
    with _refused(name):
        await control.remove(name)
    return {"name": name, "state": "removed"}


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Make an HTTP error of what is wrong with a change of the adapter `name`."""
    try:
        yield
    except KeyError as error:
        raise HTTPException(404, f"there is no adapter {name!r}") from error
    except ValidationError as error:
        raise HTTPException(400, error.errors()[0]["msg"]) from error
    except ServeError as error:
        raise HTTPException(409, str(error)) from error


def describe(control: Control, name: str) -> dict[str, Any]:
    """Return what is known of an adapter."""
    status, alias = control.reconciler.status[name], control.fleet.aliases.get(name)
    record = control.reconciler.record
    return {
        "name": name,
        "state": status.state,
        "reason": status.reason,
        "since": status.since,
        "seconds": status.seconds,
        "source": status.entry.source,
        "required": status.entry.required,
        "pin": status.entry.pin,
        "version": record(alias.current) if alias else None,
        "canary": {**record(alias.canary), "weight": alias.weight} if alias and alias.canary else None,
        "previous": [record(version) for version in alias.previous] if alias else [],
    }
