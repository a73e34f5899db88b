"""The policy port: what trainers of reinforcement learning call, on a port of its own, with a token.

POST /v1/load_lora_adapter     {"lora_name", "lora_path"}: returns when the version serves, with its digest
POST /v1/unload_lora_adapter   {"lora_name"}: the name gets 404 from now on; running requests end on their version
GET  /server_info              the settings that trainers read, as vLLM's `?config_format=json`
GET  /get_world_size           the engine's processes
POST /pause, /resume           200; nothing is paused: a version never changes under a request

Every other path is the public port's: /health, /v1/models, /v1/models/NAME, /v1/completions, ...

Errors have OpenAI's format: 400 for a body or a name that makes no sense, 401 before the body is read, 404 for an
unload of a name that no policy has, 409 where the name is another adapter's, 413 for a body of a load over 1 MiB, 422
with the reason why a policy is not served. `type` is the class in `errors`, if the error is one of its tree.
"""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field

from astra_serve.adapters.version import Version
from astra_serve.control.openai_errors import answer_errors
from astra_serve.control.policies import Policies
from astra_serve.gateway import json_body
from astra_serve.gateway.body import MIB, BodyLimit
from astra_serve.gateway.credential import Credential
from astra_serve.gateway.middleware import App, Receive, Scope, Send
from astra_serve.gateway.tenancy import caller

MAX_BODY = MIB


class Load(BaseModel):
    """vLLM's request; `load_inplace` and other fields have no effect: a load always makes a version."""

    lora_name: str
    lora_path: str = Field(min_length=1)


class Unload(BaseModel):
    """vLLM's request."""

    lora_name: str


def build(policies: Policies, public: App, info: dict[str, Any], token: str) -> App:
    """Return the application of the policy port; every request needs `token`, as Bearer or as HTTP Basic password.

    `info` are the engine's settings in the form of vLLM's /server_info. Other requests go to the `public` application,
    which asks for no key: a trainer may use every model, without limits.
    """
    app = FastAPI(title="astra-serve: policies", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=MAX_BODY, fault=json_body.fault)
    answer_errors(app)
    app.include_router(_change(policies))
    app.include_router(_as_vllm(info))
    return Credential(_Split(app, public), token)


class _Split:
    """Sends the paths of this port to `own`, and all others to the public application."""

    def __init__(self, own: FastAPI, public: App) -> None:
        self._own, self._public = own, public
        self._paths = {getattr(route, "path", "") for route in own.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") in self._paths:
            await self._own(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope.get("headers", ()) if name != b"authorization"]
        token = caller.current.set(caller.TRAINER)
        try:
            await self._public({**scope, "headers": headers}, receive, send)
        finally:
            caller.current.reset(token)


def _change(policies: Policies) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load(body: Load) -> dict[str, Any]:
        return _described(policies, await policies.load(body.lora_name, body.lora_path))

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: Unload) -> dict[str, Any]:
        policies.unload(body.lora_name)
        return {"name": body.lora_name, "state": "removed"}

    return router


def _as_vllm(info: dict[str, Any]) -> APIRouter:
    """Return the routes by which trainers learn what the server is."""
    router = APIRouter()

    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        return {"vllm_config": info}

    @router.get("/get_world_size")
    async def world_size() -> dict[str, Any]:
        return {"world_size": info["parallel_config"]["world_size"]}

    @router.post("/pause")
    async def pause() -> dict[str, Any]:
        return {"status": "not paused: versions never change under a request"}

    @router.post("/resume")
    async def resume() -> dict[str, Any]:
        return {"status": "running"}

    return router


def _described(policies: Policies, version: Version) -> dict[str, Any]:
    proof = policies.fleet.residency.of(version).proof
    return {
        "name": version.alias,
        "state": "serving",
        "version": version.name,
        "digest": version.digest,
        "probe": asdict(proof.verdict) if proof else None,
    }
