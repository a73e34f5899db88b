"""A new version on every replica, or on none.

    prepare   every replica fetches, checks, loads and probes it; no name means it yet
    verify    it is the same version everywhere
    flip      the document names it, by its digest
    serve     every replica has read the document, and serves it

Whatever goes wrong, Ctrl-C included, the document says again what it said before, and what was prepared leaves. A
rollout that is killed leaves either document behind, whole: the replicas follow it, and forget what they prepared.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from astra_serve import desired
from astra_serve.desired import Adapter
from astra_serve.errors import ServeError
from astra_serve.replicas import Replica, of_all

POLL_S = 0.2
BACK_S = 60.0  # for the replicas that answer to serve what they served before
MOST_PREVIOUS = 8

Tell = Callable[[str, str], None]  # the step, and what happened


async def prepare(
    name: str, wanted: dict[str, Any], replicas: Sequence[Replica], tell: Tell, timeout_s: float = 600.0
) -> str:
    """Have the version that `wanted` means proved on every replica, and return its digest.

    `wanted` is the body of `PUT /prepared/NAME`. Raises ServeError where one of them cannot, or they differ; then it is
    held by none.
    """

    async def one(replica: Replica) -> str:
        version = await replica.ask("PUT", f"/prepared/{name}", wanted, timeout_s)
        tell("prepare", f"{replica.name} has {version['name']}, {version['probe']['effect']:.2f} nats from the base")
        return str(version["digest"])

    try:
        digests = await of_all(replicas, one)
        if len(set(digests)) > 1:
            found = "; ".join(f"{digest} at {replica.name}" for digest, replica in zip(digests, replicas, strict=True))
            raise ServeError(f"{wanted['source']} is not the same everywhere: {found}")
    except BaseException:
        await release(name, replicas)
        raise
    tell("verify", f"{digests[0]} at all {len(replicas)}")
    return digests[0]


async def release(name: str, replicas: Sequence[Replica]) -> None:
    """Let what was prepared leave, at every replica that answers."""
    asked = (replica.ask("DELETE", f"/prepared/{name}") for replica in replicas)
    await asyncio.gather(*asked, return_exceptions=True)


async def rollout(
    name: str,
    wanted: dict[str, Any],
    replicas: Sequence[Replica],
    tell: Tell,
    *,
    where: str | None = None,
    timeout_s: float = 600.0,
) -> Adapter:
    """Let `name` mean what `wanted` says at every replica, and return the document's entry.

    `where` is the document, as seen from here; by default where the replicas say that it is. Raises ServeError, when
    everything is as before, or with what is not.
    """
    where, old = await _document(name, replicas, where)
    before = await _served(name, replicas)
    flip: asyncio.Task[None] | None = None
    try:
        digest = await prepare(name, wanted, replicas, tell, timeout_s)
        new = _entry(name, {**wanted, "digest": digest}, old, before)
        flip = asyncio.create_task(asyncio.to_thread(_write, where, name, old, new))
        await asyncio.shield(flip)
        tell("flip", where)
        async with asyncio.timeout(timeout_s):
            await of_all(replicas, lambda replica: _serves(replica, name, digest, tell))
        return new
    except BaseException as error:
        how = "the document is as before"
        if flip:
            await asyncio.wait([flip])  # a thread is not cancelled
            # What it goes back to is named by its digest: the source may say something else by now.
            back = old.model_copy(update={"digest": before}) if old and before else old
            how = await _go_back(where, name, (old, new, back), before, replicas, tell)
        if isinstance(error, asyncio.CancelledError):
            tell("back", how)
            raise
        reason = f"not everywhere within {timeout_s:.0f} s" if isinstance(error, TimeoutError) else str(error)
        raise ServeError(f"{reason}; {how}") from error
    finally:
        await release(name, replicas)


async def _document(name: str, replicas: Sequence[Replica], where: str | None) -> tuple[str, Adapter | None]:
    """Return where the document is and what it says of `name`. Raises ServeError unless all follow what is there."""
    found = [one["document"] for one in await of_all(replicas, lambda replica: replica.ask("GET", "/adapters"))]
    for replica, document in zip(replicas, found, strict=True):
        if document["fault"]:
            raise ServeError(f"{replica.name} does not follow the document as it is now: {document['fault']}")
    places = {document["where"] for document in found}
    if where is None and len(places) > 1:
        raise ServeError(f"the replicas follow different documents: {', '.join(sorted(places))}")
    where = where or str(found[0]["where"])
    try:
        desired.check_writable(where)
    except ServeError as error:
        raise ServeError(f"{error}; `prepare` first, and `status --wait` after that") from error
    await of_all(replicas, lambda replica: replica.ask("POST", "/refresh"))
    text = await asyncio.to_thread(_read, where)
    for replica in replicas:
        document = (await replica.ask("GET", "/adapters"))["document"]
        if document["digest"] != desired.digest(text):
            raise ServeError(f"{replica.name} does not follow the text at {where}: is it the same document?")
    return where, desired.parse(text, where).get(name)


async def _served(name: str, replicas: Sequence[Replica]) -> str | None:
    """Return the digest of the version that `name` means everywhere; None where it is not one."""
    answers = await of_all(replicas, lambda replica: replica.ask("GET", "/adapters"))
    versions = [adapter["version"] for answer in answers for adapter in answer["adapters"] if adapter["name"] == name]
    digests = {version["digest"] for version in versions if version}
    return digests.pop() if len(digests) == 1 else None


def _entry(name: str, wanted: dict[str, Any], old: Adapter | None, before: str | None) -> Adapter:
    kept = old.model_dump(exclude={"canary"}) if old else {"name": name}
    previous = [d for d in dict.fromkeys([before, *(old.previous if old else [])]) if d and d != wanted["digest"]]
    return Adapter.model_validate({**kept, **wanted, "previous": previous[:MOST_PREVIOUS]})


def _read(where: str) -> str:
    try:
        text = desired.read(where)
    except Exception as error:  # each store has errors of its own
        raise ServeError(f"the document at {where} cannot be read from here: {error}") from error
    if not text:
        raise ServeError(f"the document is at {where}, which is not there as seen from here: give --document")
    return text


def _write(where: str, name: str, old: Adapter | None, new: Adapter | None) -> None:
    """Let the document say `new` of `name`. Raises ServeError where it does not say `old` any more."""
    document = desired.parse(_read(where), where).replacing(name, old, new)
    try:
        desired.write(document, where)
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or "it can only be read"
        raise ServeError(f"the document at {where} cannot be changed: {reason}") from error


async def _serves(replica: Replica, name: str, digest: str | None, tell: Tell) -> None:
    """Wait until a replica has looked at the document and serves `digest` under `name`; None: whatever it says."""
    fault = (await replica.ask("POST", "/refresh"))["fault"]
    if fault:
        raise ServeError(f"{replica.name} does not follow the document as it is now: {fault}")
    while True:
        adapters = (await replica.ask("GET", "/adapters"))["adapters"]
        found = next((adapter for adapter in adapters if adapter["name"] == name), None)
        version = found and found["version"]
        if found is None and digest is None:
            return
        if found and found["state"] == "failed":
            raise ServeError(f"{replica.name} does not serve it: {found['reason']}")
        if found and version and found["state"] == "serving" and digest in (None, version["digest"]):
            tell("serve", f"{replica.name} serves {version['name']}")
            return
        await asyncio.sleep(POLL_S)


async def _go_back(
    where: str,
    name: str,
    entries: tuple[Adapter | None, Adapter, Adapter | None],
    before: str | None,
    replicas: Sequence[Replica],
    tell: Tell,
) -> str:
    """Take the flip back, wait for the replicas that answer, and say how that went.

    `entries` are those before the flip, after it, and after this.
    """
    old, new, back = entries
    try:
        if desired.parse(await asyncio.to_thread(_read, where), where).get(name) == old:
            return "the document is as before"
        await asyncio.to_thread(_write, where, name, new, back)
    except ServeError as error:
        return f"going back failed, too: {error}"
    tell("back", where)
    waits = (asyncio.wait_for(_serves(replica, name, before, tell), BACK_S) for replica in replicas)
    ended = await asyncio.gather(*waits, return_exceptions=True)
    missing = [replica.name for replica, error in zip(replicas, ended, strict=True) if error is not None]
    return "the document says again what it said before" + (f"; not there yet: {', '.join(missing)}" if missing else "")
