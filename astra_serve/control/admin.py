"""The admin API: operations for operators and their tools, on a port of its own, with a token.

GET    /adapters                      all, with state and versions; where the document is, and its fault
GET    /adapters/{name}
PUT    /adapters/{name}               {"source", "digest"?, "required"?, "pin"?, "allow_no_effect"?}; waits until served
PUT    /adapters/{name}               with Content-Type: application/x-tar: the adapter's files; the other keys as query
DELETE /adapters/{name}
POST   /adapters/{name}/rollback      {"digest"?}
POST   /adapters/{name}/canary        {"source", "weight"}
DELETE /adapters/{name}/canary
POST   /adapters/{name}/pin, /unpin
POST   /adapters/{name}/unload        out of the engine's memory; the next request loads it again
PUT    /prepared/{name}               as PUT /adapters/{name}: the engine proves the version, no alias points at it
POST   /refresh                       read the document now
GET    /events                        the newest, oldest first; ?follow=true: JSON lines, as they happen
GET    /usage                         of all tenants (`observe.usage`)
GET    /requests                      how many run; POST /drain: not ready from now on; DELETE /drain: ready again
POST   /v1/load_lora_adapter, /v1/unload_lora_adapter    vLLM's calls, as publish and remove

A slash of a name is written %2F: PUT /adapters/team%2Fadapter.

Errors, in OpenAI's format: 400 for a request that makes no sense, 401 before the body is read, 404 for a name without
an adapter, 408 for an upload that stalls, 409 where the document cannot be changed, was changed by others, a newer
change superseded this one, or no uploads are taken, 413 for a body over 1 MiB or an upload that is too large, 422 with
the reason why a version is not served. `type` is the class in `errors`, if the error is one of its tree.
"""

import hmac
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.routing import Match

from astra_serve.control import report
from astra_serve.control.control import Control
from astra_serve.control.openai_errors import answer_errors
from astra_serve.control.path_names import EncodedSlashes, PathName
from astra_serve.control.uploads import Uploads
from astra_serve.document import desired
from astra_serve.document.desired import Canary, Digest
from astra_serve.errors import ServeError, UnknownAdapter
from astra_serve.gateway import json_body
from astra_serve.gateway.body import MIB, BodyLimit, length_of
from astra_serve.gateway.middleware import App, Gateway, Receive, Scope, Send, refuse

MAX_BODY = MIB
TAR = "application/x-tar"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PublishSettings(_Body):
    """The settings of an entry that change with its version."""

    digest: Digest | None = None
    required: bool | None = None
    pin: bool | None = None
    allow_no_effect: bool | None = None


class Publish(PublishSettings):
    """A version that is to be served, and the settings that change."""

    source: str = Field(min_length=1)


class Rollback(_Body):
    """The version to go back to; by default the one before."""

    digest: Digest | None = None


class CanaryStart(_Body):
    """A version that gets a share of the requests."""

    source: str = Field(min_length=1)
    weight: float = Field(gt=0, lt=1)


class VllmLoad(_Body):
    """vLLM's own request."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class VllmUnload(_Body):
    """vLLM's own request."""

    lora_name: str
    lora_int_id: int | None = None


def build(control: Control, gateway: Gateway, token: str, uploads: Uploads) -> FastAPI:
    """Return the admin application; every request needs `Authorization: Bearer TOKEN`."""

    app = FastAPI(title="astra-serve: admin", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, most=MAX_BODY, fault=json_body.fault, streamed=_is_upload)
    app.add_middleware(EncodedSlashes)  # outside of all that looks at the path
    app.add_middleware(_Token, token=token)

    answer_errors(app)
    app.include_router(_show(control))
    app.include_router(_upload(control, uploads))
    app.include_router(_change(control))
    app.include_router(_residency(control))
    app.include_router(_drain(gateway))
    return app


class _Token:
    """ASGI middleware that refuses a request without the token before its body is read."""

    def __init__(self, app: App, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        else:
            await refuse(send, 401, "the admin token is missing or wrong")


class _UploadRoute(APIRoute):
    """A route of requests whose body is a tar; others find the next route of the same path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if _is_upload(scope) else (Match.NONE, {})


def _is_upload(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "PUT" or not scope["path"].startswith("/adapters/"):
        return False  # a route that reads its body as a whole
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() == TAR


def _show(control: Control) -> APIRouter:
    router = APIRouter()

    async def look() -> None:
        with suppress(ServeError):  # the state before is shown
            await control.fleet.residency.look()

    @router.get("/adapters")
    async def all_adapters() -> dict[str, Any]:
        await look()
        adapters = [report.describe(control, name) for name in report.names(control)]
        return {"adapters": adapters, "document": control.state.describe()}

    @router.get("/adapters/{name}")
    async def adapter(name: PathName) -> dict[str, Any]:
        await look()
        return _described(control, name)

    @router.get("/events", response_model=None)
    async def events(follow: bool = False) -> dict[str, Any] | StreamingResponse:
        if not follow:
            return {"events": [asdict(event) for event in control.fleet.events.newest]}

        async def lines() -> AsyncIterator[str]:
            async for event in control.fleet.events.follow():
                yield json.dumps(asdict(event)) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @router.post("/refresh")
    async def refresh() -> dict[str, Any]:
        await control.refresh()
        return control.state.describe()

    return router


def _upload(control: Control, uploads: Uploads) -> APIRouter:
    router = APIRouter(route_class=_UploadRoute)

    @router.put("/adapters/{name}")
    async def upload(name: PathName, request: Request, settings: Annotated[PublishSettings, Query()]) -> dict[str, Any]:
        length = length_of(request.scope)
        await uploads.publish(name, request.stream(), length, **settings.model_dump(exclude_none=True))
        return _described(control, name)

    return router


def _change(control: Control) -> APIRouter:
    """Return the routes that change the document."""
    router = APIRouter()

    @router.put("/adapters/{name}")
    async def publish(name: PathName, body: Publish) -> dict[str, Any]:
        await control.publish(name, **body.model_dump(exclude_none=True))
        return _described(control, name)

    @router.delete("/adapters/{name}")
    async def remove(name: PathName) -> dict[str, Any]:
        await control.remove(name)
        return {"name": name, "state": "removed"}

    @router.post("/adapters/{name}/rollback")
    async def rollback(name: PathName, body: Rollback | None = None) -> dict[str, Any]:
        await control.rollback(name, body.digest if body else None)
        return _described(control, name)

    @router.post("/adapters/{name}/canary")
    async def canary(name: PathName, body: CanaryStart) -> dict[str, Any]:
        await control.canary(name, Canary(version=body.source, weight=body.weight))
        return _described(control, name)

    @router.delete("/adapters/{name}/canary")
    async def end_canary(name: PathName) -> dict[str, Any]:
        await control.canary(name, None)
        return _described(control, name)

    @router.post("/adapters/{name}/pin")
    async def pin(name: PathName) -> dict[str, Any]:
        await control.pin(name, pin=True)
        return _described(control, name)

    @router.post("/adapters/{name}/unpin")
    async def unpin(name: PathName) -> dict[str, Any]:
        await control.pin(name, pin=False)
        return _described(control, name)

    @router.post("/v1/load_lora_adapter")
    async def load(body: VllmLoad) -> dict[str, Any]:
        await control.publish(body.lora_name, body.lora_path)
        return _described(control, body.lora_name)

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: VllmUnload) -> dict[str, Any]:
        return await remove(body.lora_name)

    return router


def _residency(control: Control) -> APIRouter:
    """Return the routes that change which versions are in memory, and not the aliases."""
    router = APIRouter()

    @router.post("/adapters/{name}/unload")
    async def unload(name: PathName) -> dict[str, Any]:
        alias = control.fleet.aliases.get(name)
        if alias is None:
            raise UnknownAdapter(f"there is no adapter {name!r}")
        if alias.pinned:
            raise ServeError(f"{name!r} is pinned: unpin it first")
        for version in alias.versions():
            await control.fleet.residency.unload(version)
        return _described(control, name)

    @router.put("/prepared/{name}")
    async def prepare(name: PathName, body: Publish) -> dict[str, Any]:
        entry = desired.entry({"name": name, **body.model_dump(exclude_none=True)})
        version = await control.prepare(entry)
        return report.version(control, version, control.source(version.digest))

    return router


def _drain(gateway: Gateway) -> APIRouter:
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


def _described(control: Control, name: str) -> dict[str, Any]:
    if name not in report.names(control):
        raise UnknownAdapter(f"there is no adapter {name!r}")
    return report.describe(control, name)
