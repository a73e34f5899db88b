"""The calls of the admin API: what each sends, and how its answer is read. Nothing here opens a connection.

`Client` and `AsyncClient` have a method for each of these functions, with the same parameters; it makes the call and
returns the answer. So the docstrings here are those of the methods.
"""

import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_args
from urllib.parse import quote

import httpx

from astra_serve.client import state
from astra_serve.client.state import (
    AdapterList,
    AdapterState,
    DocumentState,
    Event,
    EventList,
    Removed,
    Rotation,
    VersionState,
)
from astra_serve.client.tar import Tar, of_folder
from astra_serve.document import desired
from astra_serve.environment import ADMIN_TOKEN, admin_token
from astra_serve.errors import (
    BadDocument,
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
NAMED = {one.__name__: one for one in (BadDocument, Conflict, Superseded, UnknownAdapter, NotPublished)}
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


def publish(
    name: str,
    source: str | os.PathLike[str],
    *,
    upload: bool = False,
    digest: str | None = None,
    required: bool | None = None,
    pin: bool | None = None,
    allow_no_effect: bool | None = None,
) -> Call[AdapterState]:
    """Serve the adapter at `source` as `name`, once it is proved; returns when it serves.

    `source` is a folder that the server sees, hf://ORG/REPO@REVISION, any fsspec URL, or sha256:... of a version in the
    store; a relative path begins in the caller's folder. `digest` refuses any other content. With `required` a server
    that starts waits for it, with `pin` it is never evicted, with `allow_no_effect` it may change no answer; None keeps
    the setting as it is. With `upload` the files of the folder `source` are sent, for a server that does not see it.

    Raises NotPublished with the reason where the version is not served: then the version before
    serves on. Raises Superseded where a newer change took its place, Conflict, BadDocument, and BadUpload where the
    folder is no adapter.
    """
    wanted = _version(name, source, digest, required, pin, allow_no_effect)
    if not upload:
        return Call("PUT", _adapter(name), AdapterState, wanted)
    folder = wanted.pop("source")
    query = {key: str(value).lower() for key, value in wanted.items()}
    return Call("PUT", _adapter(name), AdapterState, query=query, tar=of_folder(folder))


def prepare(
    name: str,
    source: str | os.PathLike[str],
    *,
    digest: str | None = None,
    required: bool | None = None,
    pin: bool | None = None,
    allow_no_effect: bool | None = None,
) -> Call[VersionState]:
    """Prove the adapter at `source`, and return its version; no alias points at it. Parameters as those of `publish`.

    Raises NotPublished and BadDocument.
    """
    wanted = _version(name, source, digest, required, pin, allow_no_effect)
    return Call("PUT", f"/prepared/{_checked(name)}", VersionState, wanted)


def rollback(name: str, digest: str | None = None) -> Call[AdapterState]:
    """Serve the version before again, or the one with `digest` of the rollback history.

    Raises UnknownAdapter, NotPublished, Superseded, Conflict, and ServeError where the history has no such version.
    """
    return Call("POST", f"{_adapter(name)}/rollback", AdapterState, {"digest": digest})


def canary(name: str, source: str | os.PathLike[str], weight: float) -> Call[AdapterState]:
    """Give `weight` (above 0, below 1) of the requests to the version at `source`; a `user` stays with one version.

    `source` as in `publish`. Raises BadDocument, UnknownAdapter, NotPublished, Superseded and Conflict.
    """
    source = located(source)
    desired.entry({"name": name, "source": "x", "canary": {"version": source, "weight": weight}})
    return Call("POST", f"{_adapter(name)}/canary", AdapterState, {"source": source, "weight": weight})


def end_canary(name: str) -> Call[AdapterState]:
    """Let the current version have all requests again. Raises UnknownAdapter, NotPublished, Superseded and Conflict."""
    return Call("DELETE", f"{_adapter(name)}/canary", AdapterState)


def listing() -> Call[AdapterList]:
    """Return all adapters, and where the document is, its digest and its fault."""
    return Call("GET", "/adapters", AdapterList)


def get(name: str) -> Call[AdapterState]:
    """Return the state of an adapter. Raises UnknownAdapter."""
    return Call("GET", _adapter(name), AdapterState)


def remove(name: str) -> Call[Removed]:
    """Serve the adapter no longer. Raises UnknownAdapter and Conflict."""
    return Call("DELETE", _adapter(name), Removed)


def pin(name: str) -> Call[AdapterState]:
    """Never evict it from the engine's memory. Raises UnknownAdapter, NotPublished and Conflict."""
    return Call("POST", f"{_adapter(name)}/pin", AdapterState)


def unpin(name: str) -> Call[AdapterState]:
    """Let it be evicted. Raises UnknownAdapter, NotPublished and Conflict."""
    return Call("POST", f"{_adapter(name)}/unpin", AdapterState)


def unload(name: str) -> Call[AdapterState]:
    """Evict it from the engine's memory; its next request loads it again. Raises UnknownAdapter, and where pinned."""
    return Call("POST", f"{_adapter(name)}/unload", AdapterState)


def refresh() -> Call[DocumentState]:
    """Let the server read the document now, and return its state."""
    return Call("POST", "/refresh", DocumentState)


def events() -> Call[EventList]:
    """Return the newest events, oldest first."""
    return Call("GET", "/events", EventList)


def rotation() -> Call[Rotation]:
    """Return whether the server is in rotation, and how many requests run."""
    return Call("GET", "/requests", Rotation)


def drain() -> Call[Rotation]:
    """Take the server out of rotation: not ready, but requests are still served."""
    return Call("POST", "/drain", Rotation)


def undrain() -> Call[Rotation]:
    """Put the server back into rotation."""
    return Call("DELETE", "/drain", Rotation)


def serves(adapter: AdapterState, digest: str | None) -> bool:
    """Return whether an adapter serves, and if `digest` is given, that version. Raises NotPublished if it failed."""
    if adapter.state == "failed" and adapter.publishing is None:
        raise NotPublished(f"{adapter.name!r} is not served: {adapter.reason}")
    return adapter.state == "serving" and adapter.version is not None and digest in (None, adapter.version.digest)


def check_followed(url: str, document: DocumentState) -> None:
    """Raise BadDocument where a server does not follow the document as it is now."""
    if document.fault:
        raise BadDocument(f"{url} does not follow the document as it is now: {document.fault}")


def late(url: str, name: str, digest: str | None, timeout_s: float) -> NoAnswer:
    """Return the error of a version that is not served in time."""
    return NoAnswer(f"{url} does not serve {name}{f' as {digest}' if digest else ''} within {timeout_s:g} s")


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


def _version(
    name: str,
    source: str | os.PathLike[str],
    digest: str | None,
    required: bool | None,
    pin: bool | None,
    allow_no_effect: bool | None,
) -> dict[str, Any]:
    """Return the keys of an entry that are given. Raises BadDocument where one of them makes no sense."""
    flags = {"required": required, "pin": pin, "allow_no_effect": allow_no_effect}
    given = {"source": located(source), "digest": digest, **flags}
    wanted = {key: value for key, value in given.items() if value is not None}
    desired.entry({"name": name, **wanted})
    return wanted


def located(source: str | os.PathLike[str]) -> str:
    """Return a source with its path absolute, if it is one: the server runs in another folder."""
    source = os.fspath(source)
    if not source or "://" in source or source.startswith("sha256:"):
        return source
    return os.path.abspath(os.path.expanduser(source))  # noqa: PTH100, PTH111 (links stay as they are)


def _adapter(name: str) -> str:
    return f"/adapters/{_checked(name)}"


def _checked(name: str) -> str:
    """Return a name as a part of a path. Raises BadDocument where no adapter can have it."""
    if not re.fullmatch(desired.NAME, name):
        desired.entry({"name": name, "source": "x"})  # raises
    return quote(name, safe="")
