"""The credential of a port of its own: as `Authorization: Bearer TOKEN`, or as the password of HTTP Basic.

Clients that know no tokens send a password that is in their URL, `http://x:TOKEN@HOST:PORT`; the user is any text.
"""

import base64
import binascii
import hmac

from astra_serve.gateway.middleware import App, Receive, Scope, Send, refuse


class Credential:
    """ASGI middleware that refuses a request without the token, before its body is read."""

    def __init__(self, app: App, token: str) -> None:
        """Raises ValueError without a token."""
        if not token:
            raise ValueError("a credential cannot be empty")
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it with 401."""
        given = next((value for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(_secret(given), self._token):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            where = "as Authorization: Bearer TOKEN, or in the URL: http://x:TOKEN@HOST:PORT"
            await refuse(send, 401, f"the token is missing or wrong: send it {where}")


def _secret(header: bytes) -> bytes:
    """Return what an Authorization header has as its secret; empty where it has none."""
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
