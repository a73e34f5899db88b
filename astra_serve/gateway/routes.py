"""The routes that are served: all others of vLLM, of its plugins and of its development mode are removed.

A route that is not in this list could compute without a lease, or change the engine for everyone.
"""

import re
from collections.abc import Iterable
from typing import Any

from starlette.exceptions import HTTPException

from astra_serve.gateway.middleware import App, Receive, Scope, Send, refuse

SERVED = re.compile(
    "/("
    r"v1/(completions|chat/completions|chat/completions/batch|embeddings|score|rerank|messages(/count_tokens)?"
    r"|models(/\{[^/]+\})?|responses(/\{[^/]+\}(/cancel)?)?)"
    r"|v2/(embed|rerank)"
    r"|tokenize|detokenize|classify|pooling|score|rerank"
    r"|health|livez|readyz|metrics|ping|version|load|usage|openapi\.json"
    ")"
)


def served(routes: Iterable[Any]) -> list[Any]:
    """Return the routes of an application that are served, by the patterns of their paths."""
    return [route for route in routes if SERVED.fullmatch(getattr(route, "path", ""))]


class RouteErrors:
    """ASGI middleware that answers with 404 or 405 where the router behind it finds no route."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on to the router, which raises before an answer has begun."""
        try:
            await self._app(scope, receive, send)
        except HTTPException as error:
            what = f"{scope['method']} {scope['path'][:200]}"
            await refuse(send, error.status_code, f"{what} is not served: see /openapi.json for what is")
