"""API keys: wanted on every path but those of the server's state, and the prefix cache of each.

vLLM wants its keys under /v1 and a few other prefixes alone; /tokenize, /pooling and others compute as well. vLLM
decides whether a key is one of its keys; this module decides which paths want one.
"""

import hmac
import secrets
from collections.abc import Callable, Collection

from starlette.datastructures import Headers

from astra_serve.gateway.middleware import OPEN, App, Receive, Scope, Send, refuse


class ApiKeys:
    """ASGI middleware that refuses requests whose headers have no key that is `known`."""

    def __init__(self, app: App, known: Callable[[Headers], bool]) -> None:
        self._app, self._known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it with 401."""
        if not _wants_a_key(scope) or self._known(Headers(scope=scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refuse(send, 401, "the API key is missing or wrong: send it as Authorization: Bearer KEY")


class CacheSalts:
    """The salts of the prefix cache by API key: requests share the cached blocks of their own key alone.

    Otherwise the time to the first token tells the holder of one key what the holder of another has asked. With one key
    or none there is nothing to hide, and no salt. The salts are other ones in each process.
    """

    def __init__(self, keys: Collection[str]) -> None:
        self._secret = secrets.token_bytes(32) if len(set(keys)) > 1 else None

    def of(self, headers: Headers) -> str | None:
        """Return the salt of a request's key: 64 hexadecimal digits, or None."""
        if self._secret is None:
            return None
        _, _, key = headers.get("authorization", "").partition(" ")
        return hmac.digest(self._secret, key.encode(), "sha256").hex()


def _wants_a_key(scope: Scope) -> bool:
    if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
        return False
    return scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN
