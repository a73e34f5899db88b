"""Adapter names in the paths of the admin API: `team/adapter` is the one part `team%2Fadapter`.

Servers decode a path before routes are found, so that an encoded slash would end a part. Here it stays inside of its
part: `POST /adapters/team/rollback` is a rollback of `team`, and no bare slash is ever part of a name.
"""

from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

from astra_serve.gateway.middleware import App, Receive, Scope, Send

_SLASH = "\x1f"  # stands for an encoded slash while routes are found; no name has it
_NONE = "\ufffd"  # in place of that character where a client has sent it

PathName = Annotated[str, AfterValidator(lambda part: part.replace(_SLASH, "/"))]  # a name in the path of a route


class EncodedSlashes:
    """ASGI middleware that keeps encoded slashes inside of their part of a path."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        if raw := scope.get("raw_path"):
            scope = {**scope, "path": path_of(raw)}
        await self._app(scope, receive, send)


def path_of(raw: bytes) -> str:
    """Return the decoded path of a request, without its query, in which an encoded slash ends no part."""
    parts = raw.partition(b"?")[0].decode("ascii", "replace").split("/")
    return "/".join(unquote(part).replace(_SLASH, _NONE).replace("/", _SLASH) for part in parts)
