"""Adapter names in the paths of the admin API: `team/adapter` is the one part `team%2Fadapter`.

Servers decode a path before routes are found, so that an encoded slash would end a part. Here it stays encoded until
the route is found: `POST /adapters/team/rollback` is a rollback of `team`, and no bare slash is ever part of a name.
Each part is decoded once: `a%252Fb` is a name with a percent sign, which no adapter has.
"""

from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

from astra_serve.gateway.middleware import App, Receive, Scope, Send

PathName = Annotated[str, AfterValidator(unquote)]  # a name in the path of a route


class EncodedSlashes:
    """ASGI middleware that keeps encoded slashes inside of their part of a path."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, whose path has `/` and `%` of a part as %2F and %25."""
        if raw := scope.get("raw_path"):
            scope = {**scope, "path": path_of(raw)}
        elif path := scope.get("path"):  # decoded already: its slashes end parts
            scope = {**scope, "path": _escaped(path, slash="/")}
        await self._app(scope, receive, send)


def path_of(raw: bytes) -> str:
    """Return the path of a request, without its query, decoded but for `/` and `%` inside of a part."""
    parts = raw.partition(b"?")[0].decode("ascii", "replace").split("/")
    return "/".join(_escaped(unquote(part)) for part in parts)


def _escaped(part: str, slash: str = "%2F") -> str:
    return part.replace("%", "%25").replace("/", slash)
