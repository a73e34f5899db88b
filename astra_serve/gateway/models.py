"""The models that requests may name: OpenAI's `GET /v1/models` and `GET /v1/models/NAME`."""

import time
from dataclasses import asdict
from typing import Any

from starlette.responses import JSONResponse, Response

from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.version import Version
from astra_serve.errors import Unavailable
from astra_serve.gateway.errors import error_body
from astra_serve.gateway.tenancy import caller
from astra_serve.gateway.tenancy.view import View

PATH = "/v1/models"


class Models:
    """The handlers of both paths."""

    def __init__(self, fleet: Fleet, max_model_len: int) -> None:
        """`max_model_len` is the length of the base's context, and of each adapter's, in tokens."""
        self._fleet, self._max_model_len = fleet, max_model_len
        self._started = int(time.time())

    async def show_all(self) -> dict[str, Any]:
        """List the base and the adapters that are served to the tenant."""
        return {"object": "list", "data": [self._card(name) for name in self._view().names()]}

    async def show(self, model: str) -> Response:
        """Show one model, and the digest and the proof of its version; a name with slashes is a base of the hub."""
        view = self._view()
        version = view.resolve(model)
        if version or (model == self._fleet.base_name and view.has(model)):
            return JSONResponse(self._card(model) | (self._proved(version) if version else {}))
        error = view.unknown(model)
        if isinstance(error, Unavailable):
            headers = {"Retry-After": str(error.retry_after_s)}
            return Response(error_body(503, str(error), "model"), 503, headers, "application/json")
        return Response(error_body(404, str(error), "model"), 404, media_type="application/json")

    def _view(self) -> View:
        return View(self._fleet, caller.current.get())

    def _card(self, model: str) -> dict[str, Any]:
        """Return a model's facts; `created` is when the base, or the adapter's current version, began to serve."""
        base, version = self._fleet.base_name, self._fleet.resolve(model)
        return {
            "id": model,
            "object": "model",
            "created": self._fleet.since[version.alias] if version else self._started,
            "owned_by": "vllm",
            "root": version.name if version else base,
            "parent": base if version else None,
            "max_model_len": self._max_model_len,
        }

    def _proved(self, version: Version) -> dict[str, Any]:
        """Return a version's digest, and whether the engine has proved it: the state is proved, failed or unproved."""
        residence = self._fleet.residency.of(version)
        state = "failed" if residence.failed is not None else "proved" if residence.proof else "unproved"
        verdict = asdict(residence.proof.verdict) if residence.proof else {}
        return {"digest": version.digest, "proof": {"state": state, **verdict}}
