"""The admin API: what operators and their tools may do, on a port of its own, with a token.

GET    /adapters                      all, with state and versions
GET    /adapters/{name}
PUT    /adapters/{name}               {"source", "digest"?, "required"?, "pin"?, "allow_no_effect"?}  until it serves
DELETE /adapters/{name}
POST   /adapters/{name}/alias         {"version"}: name@digest-prefix, or sha256:...
POST   /adapters/{name}/unload        out of the engine's memory; its next request loads it again
POST   /adapters/{name}/rollback      {"digest"?}
POST   /adapters/{name}/canary        {"source", "weight"}, or {} to end it
POST   /adapters/{name}/pin, /unpin
GET    /events                        what happened, oldest first; ?follow=true: JSON lines, as it happens
GET    /requests                      how many run; POST /drain: not ready from now on; DELETE /drain: ready again
POST   /v1/load_lora_adapter, /v1/unload_lora_adapter    as vLLM's, onto the same lifecycle
"""

import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from astra_serve.control import Control
from astra_serve.desired import Canary, Digest
from astra_serve.errors import ServeError
from astra_serve.gateway import Gateway
from astra_serve.reconcile import Status


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

    @app.get("/adapters")
    async def all_adapters() -> dict[str, Any]:
        await look()
        adapters = [describe(control, name) for name in control.reconciler.status]
        return {"adapters": adapters, "fault": control.fault}

    @app.get("/adapters/{name}")
    async def adapter(name: str) -> dict[str, Any]:
        if name not in control.reconciler.status:
            raise HTTPException(404, f"there is no adapter {name!r}")
        await look()
        return describe(control, name)

    @app.put("/adapters/{name}")
    async def publish(name: str, body: Publish) -> dict[str, Any]:
        settings = body.model_dump(exclude={"source"}, exclude_none=True)
        return await done(name, lambda: control.publish(name, body.source, **settings))

    @app.delete("/adapters/{name}")
    async def remove(name: str) -> dict[str, Any]:
        async def removed() -> None:
            await control.remove(name)

        return await done(name, removed)

    @app.post("/adapters/{name}/rollback")
    async def rollback(name: str, body: Rollback | None = None) -> dict[str, Any]:
        return await done(name, lambda: control.rollback(name, body.digest if body else None))

    @app.post("/adapters/{name}/canary")
    async def canary(name: str, body: CanaryChange) -> dict[str, Any]:
        if (body.source is None) != (body.weight is None):
            raise HTTPException(400, "a canary needs a source and a weight; give neither to end it")
        found = Canary(version=body.source, weight=body.weight).model_dump() if body.source and body.weight else None
        return await done(name, lambda: control.change(name, canary=found))

    @app.post("/adapters/{name}/pin")
    async def pin(name: str) -> dict[str, Any]:
        return await done(name, lambda: control.change(name, pin=True))

    @app.post("/adapters/{name}/unpin")
    async def unpin(name: str) -> dict[str, Any]:
        return await done(name, lambda: control.change(name, pin=False))

    @app.post("/adapters/{name}/alias")
    async def alias(name: str, body: AliasOf) -> dict[str, Any]:
        digest = body.version
        if not digest.startswith("sha256:"):
            version = control.fleet.resolve(digest)
            if version is None:
                raise HTTPException(404, f"there is no version {digest!r}")
            digest = version.digest
        return await done(name, lambda: control.publish(name, digest, digest=digest))

    @app.post("/adapters/{name}/unload")
    async def unload(name: str) -> dict[str, Any]:
        if name not in control.fleet.aliases:
            raise HTTPException(404, f"there is no adapter {name!r}")
        if control.reconciler.status[name].entry.pin:
            raise HTTPException(409, f"{name!r} is pinned: unpin it first")
        for version in list(control.fleet.aliases[name].versions()):
            await control.fleet.places.unload(version)
        return describe(control, name)

    @app.get("/events", response_model=None)
    async def events(follow: bool = False) -> dict[str, Any] | StreamingResponse:
        if not follow:
            return {"events": [asdict(event) for event in control.fleet.journal.events]}

        async def lines() -> AsyncIterator[str]:
            async for event in control.fleet.journal.follow():
                yield json.dumps(asdict(event)) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.get("/requests")
    async def requests() -> dict[str, Any]:
        return {"drained": gateway.drained, "running": len(gateway.running)}

    @app.post("/drain")
    async def drain() -> dict[str, Any]:
        gateway.drained = True
        return await requests()

    @app.delete("/drain")
    async def undrain() -> dict[str, Any]:
        gateway.drained = False
        return await requests()

    @app.post("/v1/load_lora_adapter")
    async def load(body: VllmLoad) -> dict[str, Any]:
        return await done(body.lora_name, lambda: control.publish(body.lora_name, body.lora_path))

    @app.post("/v1/unload_lora_adapter")
    async def unload_as_vllm(body: VllmUnload) -> dict[str, Any]:
        return await remove(body.lora_name)

    async def look() -> None:
        with suppress(ServeError):  # what was known before is shown
            await control.fleet.places.look()

    async def done(name: str, change: Callable[[], Awaitable[Status | None]]) -> dict[str, Any]:
        try:
            status = await change()
        except KeyError as error:
            raise HTTPException(404, f"there is no adapter {name!r}") from error
        except ValidationError as error:
            raise HTTPException(400, error.errors()[0]["msg"]) from error
        except ServeError as error:
            raise HTTPException(409, str(error)) from error
        if status is None:
            return {"name": name, "state": "removed"}
        if status.state == "failed":
            raise HTTPException(422, f"{name!r} was not published: {status.reason}")
        return describe(control, name)

    return app


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
