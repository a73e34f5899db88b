"""An operator's middleware, for `--middleware tests.support.refusing.Refuse`."""

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Refuse:
    """Refuses requests with the header X-Refuse."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(name == b"x-refuse" for name, _ in scope.get("headers", ())):
            await PlainTextResponse("refused", 418)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
