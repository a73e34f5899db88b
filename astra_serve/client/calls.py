"""The calls of the admin API, with what each sends.

`Client` and `AsyncClient` have a method for each of these functions, with the same parameters; it makes the call and
returns the answer. So the docstrings here are those of the methods.
"""

import os
import re
from collections.abc import Sequence
from datetime import date
from typing import Any
from urllib.parse import quote

from astra_serve.client.exchange import Call
from astra_serve.client.state import (
    AdapterList,
    AdapterState,
    DocumentState,
    EventList,
    Removed,
    Rotation,
    Usage,
    VersionState,
)
from astra_serve.client.tar import of_folder
from astra_serve.document import desired
from astra_serve.errors import BadDocument, NoAnswer, NotPublished


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


def usage(
    *,
    first_day: date | str | None = None,
    last_day: date | str | None = None,
    tenant: str | None = None,
    adapter: str | None = None,
    by: Sequence[str] | None = None,
) -> Call[Usage]:
    """Return the requests and tokens of some days of UTC, as 2026-11-28; by default of the last 31.

    `by` are the columns of the rows, of day, tenant, adapter and version; by default all. Raises BadQuery.
    """
    given = {
        "from": first_day,
        "to": last_day,
        "tenant": tenant,
        "adapter": adapter,
        "by": ",".join(by) if by else None,
    }
    return Call("GET", "/usage", Usage, query={name: str(value) for name, value in given.items() if value is not None})


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
