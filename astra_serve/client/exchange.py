"""How a call becomes a request of HTTP, and the answer a result or an error; nothing here opens a connection."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args

import httpx

from astra_serve.client import state
from astra_serve.client.state import Event
from astra_serve.client.tar import Tar
from astra_serve.environment import ADMIN_TOKEN, admin_token
from astra_serve.errors import (
    BadDocument,
    BadQuery,
    BadUpload,
    Conflict,
    NoAnswer,
    NotPublished,
    Refused,
    ServeError,
    Superseded,
    UnknownAdapter,
)

Result = TypeVar("Result")
TAR = "application/x-tar"
# The errors that a server names in `type`; of one that names none the status has to say it.
NAMED = {one.__name__: one for one in (BadDocument, BadQuery, Conflict, Superseded, UnknownAdapter, NotPublished)}
FOLLOW: dict[str, Any] = {"method": "GET", "url": "/events", "params": {"follow": "true"}}
BY_STATUS = {400: BadDocument, 404: UnknownAdapter, 422: NotPublished}


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One call of the admin API."""

    method: str
    path: str
    answer: type[Result]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    tar: Tar | None = None  # the body, in place of `body`


def checked_token(token: str | None) -> str:
    """Return the admin token, by default that of the environment. Raises ServeError."""
    token = admin_token() if token is None else token
    if not token or not token.isascii() or not token.isprintable():
        raise ServeError(f"the admin token, one line of ASCII: put it into {ADMIN_TOKEN}")
    return token


def admin_url(url: str) -> httpx.URL:
    """Return the URL of an admin port. Raises ServeError, which shows none of what may be a secret."""
    if "@" in url or "?" in url:
        raise ServeError("a URL of an admin port is http://HOST:PORT: the token comes from the environment")
    try:
        found = httpx.URL(url.rstrip("/"))
        named = bool(found.host)
    except (httpx.InvalidURL, ValueError) as error:  # a host that no name can be is a ValueError
        raise ServeError(f"{url} is no URL: {error}") from error
    if found.scheme not in ("http", "https") or not named:
        raise ServeError(f"{url} is no URL of an admin port: http://HOST:PORT")
    return found


def request(call: Call[Any]) -> dict[str, Any]:
    """Return the arguments of httpx's `request`; the bytes of a tar are for the client to add as `content`."""
    found = {"method": call.method, "url": call.path, "params": dict(call.query)}
    if call.tar is None:
        return {**found, "json": call.body}
    return {**found, "headers": {"Content-Type": TAR, "Content-Length": str(call.tar.size)}}


def result(call: Call[Result], url: str, answer: httpx.Response) -> Result:
    """Return the answer of `url` to a call.

    Raises the error of the server, with its line, and NoAnswer where it is no admin port.
    """
    if not answer.is_success:
        raise refused(url, answer)
    try:
        return state.read(call.answer, answer.json())
    except ValueError as error:
        raise NoAnswer(f"{url} does not answer as an admin port of this version of astra-serve does") from error


def event(line: str) -> Event:
    """Return an event of the stream of events."""
    return state.read(Event, json.loads(line))


def refused(url: str, answer: httpx.Response) -> ServeError:
    """Return the error of an answer that is no success."""
    try:
        error = answer.json()["error"]
        message, kind, status = str(error["message"]), error.get("type"), answer.status_code
    except (ValueError, KeyError, TypeError, AttributeError):
        return NoAnswer(
            f"{url} answers with {answer.status_code}: is it the admin port, of this version of astra-serve?"
        )
    if kind == BadUpload.__name__:
        return BadUpload(message, status)
    named: type[ServeError] | None = NAMED.get(str(kind)) or BY_STATUS.get(status)
    return named(message) if named else Refused(message, status)


def no_answer(url: str, error: httpx.HTTPError) -> NoAnswer:
    """Return the error of a call that got no answer."""
    return NoAnswer(f"{url} does not answer: {str(error) or type(error).__name__}")


def as_method(method: Callable[..., Any], make: Callable[..., Any]) -> Any:
    """Return `method`, a client's, with the name, the documentation and the parameters of the function of its call."""
    signature = inspect.signature(make, eval_str=True)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    answers = get_args(signature.return_annotation)[0]
    shown = signature.replace(parameters=[me, *signature.parameters.values()], return_annotation=answers)
    method.__name__, method.__doc__ = make.__name__, make.__doc__
    method.__signature__ = shown  # type: ignore[attr-defined]
    return method
