"""Errors for clients, in OpenAI's format."""

import json

KINDS = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "requests",  # the unit of the limit that was reached, as OpenAI has it
    431: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
CODES = {429: "rate_limit_exceeded"}


def error_body(status: int, message: str, param: str | None = None, kind: str | None = None) -> bytes:
    """Return the body of an error as JSON in ASCII: texts of clients that cannot be encoded are escaped.

    `kind` is its type, by default the usual one of the status.
    """
    kind = kind or KINDS.get(status, "BadRequestError")
    error = {"message": message, "type": kind, "param": param, "code": CODES.get(status, status)}
    return json.dumps({"error": error}).encode()
