"""API keys: wanted on every path but those of the server's state.

With a keys document GET /metrics wants a key, too, whose tenant may read it: it names every adapter and every tenant.
"""

from starlette.datastructures import Headers

from astra_serve.gateway.middleware import OPEN, App, Receive, Scope, Send, refuse
from astra_serve.gateway.tenancy import caller
from astra_serve.gateway.tenancy.keyring import Keyring

METRICS = "/metrics"


class Authentication:
    """ASGI middleware that refuses requests whose key opens nothing, before their body is read."""

    def __init__(self, app: App, keyring: Keyring) -> None:
        self._app, self._keyring = app, keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on as its tenant's, or refuse it with 401, or with 403 where the tenant has not the right."""
        if not self._wants_a_key(scope):
            await self._app(scope, receive, send)
            return
        found = self._keyring.caller(Headers(scope=scope))
        if found is None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await refuse(send, 401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")
            return
        if _path(scope) == METRICS and not found.may_read_metrics:
            await refuse(send, 403, "this key may not read the metrics, which name all tenants: see `metrics` of keys")
            return
        token = caller.current.set(found)
        try:
            await self._app(scope, receive, send)
        finally:
            caller.current.reset(token)

    def _wants_a_key(self, scope: Scope) -> bool:
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return False
        return _path(scope) not in OPEN or (self._keyring.follows and _path(scope) == METRICS)


def _path(scope: Scope) -> str:
    return str(scope["path"].removeprefix(scope.get("root_path", "")))
