"""The errors of the admin API and of the policy port as answers of HTTP, in OpenAI's format: in this one place."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from astra_serve.errors import BadDocument, BadUpload, NotPublished, ServeError, UnknownAdapter
from astra_serve.gateway.errors import error_body

STATUS: dict[type[Exception], int] = {BadDocument: 400, UnknownAdapter: 404, NotPublished: 422}  # others: 409
DIGEST = "a digest is sha256: and 64 hexadecimal digits"
SLASH = ": the slash of an adapter's name is %2F in a path"


def answer_errors(app: FastAPI) -> None:
    """Let `app` answer every error in OpenAI's format; `type` is the class, if it is one of the tree in `errors`."""

    @app.exception_handler(HTTPException)
    async def _no_route(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        hint = SLASH if error.status_code == 404 and path.startswith(("/adapters/", "/prepared/")) else ""
        return _answer(error.status_code, f"{request.method} {path} is not served{hint}")

    @app.exception_handler(RequestValidationError)
    async def _bad_body(_: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        reason = DIGEST if fault["type"] == "string_pattern_mismatch" else fault["msg"]
        return _answer(400, f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {reason}")

    @app.exception_handler(ServeError)
    async def _serve_error(_: Request, error: ServeError) -> Response:
        status = error.status if isinstance(error, BadUpload) else STATUS.get(type(error), 409)
        return _answer(status, str(error), type(error).__name__)

    @app.exception_handler(Exception)
    async def _failed(*_: Any) -> Response:
        return _answer(500, "the server has failed: its log has the reason")


def _answer(status: int, message: str, kind: str | None = None) -> Response:
    return Response(error_body(status, message, kind=kind), status, media_type="application/json")
