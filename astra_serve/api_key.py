"""API keys, asked for on every path but those that say how the server is.

vLLM asks for its keys under /v1 and a few other prefixes alone; /tokenize, /pooling and others compute as well.
"""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers

from astra_serve.gateway import OPEN, App, Receive, Scope, Send, refuse


class ApiKeys:
    """ASGI middleware that lets nobody in who has none of `keys`, in OpenAI's way: `Authorization: Bearer KEY`."""

    def __init__(self, app: App, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it with 401."""
        asks = scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS"
        if not asks or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN or self._known(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refuse(send, 401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key)  # of one length whatever was sent
        known = [hmac.compare_digest(digest, one) for one in self._digests]
        return scheme.lower() == "bearer" and any(known)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
