"""A new version on every replica, or on none.

    prepare   every replica fetches, checks and loads it, and proves it on its engine; no name means it yet
    verify    it is the same version everywhere
    flip      the document names it, by its digest
    serve     every replica has read the document, and serves it

Whatever goes wrong, a signal included, the document's entry is put back, and names the version that was served. A
rollout that is killed leaves one document or the other, whole, and the replicas follow it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astra_serve.client.replicas import Replica, of_all
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Document
from astra_serve.errors import BadDocument, Conflict, ServeError
from converter.errors import first_line

POLL_S = 0.2
LOOKS = 3  # at a document that others change, until the replicas have read the same
BACK_S = 60.0  # for a store that fails to take the document back, and for replicas to serve what they served before
KEPT = {"required", "pin", "allow_no_effect"}  # of an entry whose version changes

Tell = Callable[[str, str], None]  # the step, and what happened


async def prepare(name: str, wanted: dict[str, Any], replicas: Sequence[Replica], tell: Tell, timeout_s: float) -> str:
    """Have every replica prove the version that `wanted` means, and return its digest.

    `wanted` is the body of `PUT /prepared/NAME`. Raises ServeError where one of them cannot, or they differ.
    """

    async def one(replica: Replica) -> str:
        version = await replica.prepare(name, wanted, timeout_s)
        tell("prepare", f"{replica.name} has {version['name']}, {version['probe']['effect']:.2f} nats from the base")
        return str(version["digest"])

    digests = await of_all(replicas, one)
    if len(set(digests)) > 1:
        found = "; ".join(f"{digest} at {replica.name}" for digest, replica in zip(digests, replicas, strict=True))
        raise ServeError(f"{wanted['source']} is not the same everywhere: {found}")
    tell("verify", f"{digests[0]} at all {len(replicas)}")
    return digests[0]


async def rollout(
    name: str,
    wanted: dict[str, Any],
    replicas: Sequence[Replica],
    tell: Tell,
    timeout_s: float,
    where: str | None = None,
) -> Adapter:
    """Let `name` mean what `wanted` says at every replica, and return the document's entry.

    `where` is the document, as seen from here; by default where the replicas say that it is. Raises ServeError, when
    everything is as before, or with what is not.
    """
    where, document = await _document(replicas, where)
    old = document.get(name)
    there = await of_all(replicas, lambda replica: _settled(replica, name, timeout_s))
    served = [adapter for adapter in there if adapter and adapter["version"]]
    kept = old.model_dump(include=KEPT, exclude_defaults=True) if old else {}
    try:
        digest = await prepare(name, {**kept, **wanted}, replicas, tell, timeout_s)
    except ServeError as error:
        raise ServeError(f"{error}; nothing was changed") from error
    before = dict.fromkeys(adapter["version"]["digest"] for adapter in served)
    previous = desired.previous([*before, *(old.previous if old else [])], digest)
    new = desired.entry({"name": name, **kept, **wanted, "digest": digest, "previous": previous})
    proved = {adapter["version"]["digest"] for adapter in served if adapter["state"] == "serving"}
    flip = Flip(where, document, new, proved.pop() if len(proved) == 1 else None)
    await _flip(flip, replicas, tell, timeout_s)
    return new


@dataclass
class Flip:
    """One change of an entry of the document at `where`, which was `seen`, to `new`; and back.

    `served` is the version that was served before: an entry that named none gets it on the way back, because its source
    may say something else by now.
    """

    where: str
    seen: Document
    new: Adapter
    served: str | None
    written: bool = False  # or perhaps written
    _text: str = ""  # as it was
    _changed: str = ""

    @property
    def old(self) -> Adapter | None:
        """Return the entry as it was; None where there was none."""
        return self.seen.get(self.new.name)

    def write(self) -> None:
        """Let the document say `new`. Raises ServeError where it does not say what it said, or cannot be changed."""

        def change(text: str) -> str:
            document = desired.parse(text, self.where)
            if not text.strip() and self.seen.adapters:
                raise BadDocument(f"{self.where} is empty or gone meanwhile")
            if document.get(self.new.name) == self.new:
                return text  # another rollout's, and not this one's to take back
            changed = desired.dump(document.replacing(self.new.name, self.old, self.new))
            self.written = True
            return changed

        self._text, self._changed = _edit(self.where, change)

    def back(self) -> str | None:
        """Let the document say what it said, or return why there is nothing to do. Raises ServeError."""
        nothing: str | None = None

        def change(text: str) -> str:
            nonlocal nothing
            document = desired.parse(text, self.where)
            there = document.get(self.new.name)
            if there != self.new:
                nothing = "as before" if there == self.old else "as somebody else has left it"
                return text
            back = self.old
            if back and not back.digest:
                back = back.model_copy(update={"digest": self.served})
            if back == self.old and text == self._changed and self._text.strip():
                return self._text  # with its comments
            return desired.dump(document.replacing(self.new.name, self.new, back))

        _edit(self.where, change)
        return nothing and f"the document is {nothing}"

    def check(self) -> None:
        """Raise ServeError unless the document still says `new`: where nothing keeps others away, they may undo it."""
        if desired.parse(_read(self.where), self.where).get(self.new.name) != self.new:
            raise Conflict(f"somebody else has changed {self.new.name!r} in the document meanwhile")


async def _flip(flip: Flip, replicas: Sequence[Replica], tell: Tell, timeout_s: float) -> None:
    """Let the document and all replicas say the new entry, or the old one again. Raises ServeError."""
    writing = asyncio.create_task(asyncio.to_thread(flip.write))
    name, digest = flip.new.name, flip.new.digest
    try:
        await asyncio.shield(writing)
        tell("flip", flip.where)
        await of_all(replicas, lambda replica: _serves(replica, name, digest, tell, timeout_s), hurry=True)
        await asyncio.to_thread(flip.check)
    except BaseException as error:
        await _whatever_comes(asyncio.wait([writing]))  # a thread is not cancelled
        if not flip.written:
            raise
        tell("back", f"{str(error) or 'told to stop'}: the document is put back, which may take a moment")
        how = await _whatever_comes(_go_back(flip, replicas, tell))
        if isinstance(error, ServeError):
            raise ServeError(f"{error}; {how}") from error
        tell("back", how)
        raise


async def _document(replicas: Sequence[Replica], where: str | None) -> tuple[str, Document]:
    """Return where the document is, and what it says. Raises ServeError unless all follow what is there."""
    found = await of_all(replicas, _refreshed)
    places = {str(document["where"]) for document in found}
    if where is None and len(places) > 1:
        raise ServeError(f"the replicas follow different documents: {', '.join(sorted(places))}")
    where = where or places.pop()
    if "://" not in where and not Path(where).exists():
        raise ServeError(
            f"the replicas' document is {where}, which is not there as seen from here: give --document, or write "
            "'adapters: []' into it; where it is a ConfigMap `prepare`, change it, and wait with `status --wait`"
        )
    try:
        document_text.check_writable(where)
    except ServeError as error:
        raise ServeError(f"{error}; `prepare` first, and `status --wait` after that") from error
    for _ in range(LOOKS):
        text = await asyncio.to_thread(_read, where)
        others = [one["digest"] != document_text.digest(text) for one in found]
        if not any(others):
            return where, desired.parse(text, where)
        found = await of_all(replicas, _refreshed)  # somebody may have changed it between the two
    raise ServeError(
        f"{replicas[others.index(True)].name} does not follow the text at {where}: is it the same document?"
    )


async def _refreshed(replica: Replica) -> dict[str, Any]:
    """Let a replica read the document, and return what it says of that. Raises ServeError where it cannot follow it."""
    document = await replica.refresh()
    if document["fault"]:
        raise ServeError(f"{replica.name} does not follow the document as it is now: {document['fault']}")
    return document


def _read(where: str) -> str:
    try:
        return document_text.read(where)
    except Exception as error:  # each store has errors of its own
        raise ServeError(f"the document at {where} cannot be read from here: {first_line(error)}") from error


def _edit(where: str, change: Callable[[str], str]) -> tuple[str, str]:
    try:
        return document_text.edit(where, change)
    except ServeError:
        raise
    except Exception as error:
        raise ServeError(f"the document at {where} cannot be changed: {first_line(error)}") from error


async def _settled(replica: Replica, name: str, timeout_s: float) -> dict[str, Any] | None:
    """Wait until an adapter is served or failed, and return it; None where there is none. Raises ServeError."""
    try:
        async with asyncio.timeout(timeout_s):
            while (found := await replica.adapter(name)) and found["state"] not in ("serving", "failed"):
                await asyncio.sleep(POLL_S)
            return found
    except TimeoutError as error:
        raise ServeError(f"{replica.name} does not serve it within {timeout_s:.0f} s") from error


async def _serves(replica: Replica, name: str, digest: str | None, tell: Tell, timeout_s: float) -> None:
    """Let a replica look at the document, and wait until it serves `digest` under `name`, or for None nothing.

    Raises ServeError where it does not.
    """
    await _refreshed(replica)
    found = await _settled(replica, name, timeout_s)
    version = found and found["version"]
    if found and found["state"] == "failed":
        raise ServeError(f"{replica.name} does not serve it: {found['reason']}")
    if (version and version["digest"]) != digest:
        raise ServeError(f"{replica.name} serves {version['name'] if version else 'nothing'} all the same")
    if version:
        tell("serve", f"{replica.name} serves {version['name']}")


async def _go_back(flip: Flip, replicas: Sequence[Replica], tell: Tell) -> str:
    """Put the document back, wait for the replicas that answer, and say how that went."""
    end = asyncio.get_running_loop().time() + BACK_S
    while True:
        try:
            if nothing := await asyncio.to_thread(flip.back):
                return nothing
            break
        except ServeError as error:
            if asyncio.get_running_loop().time() > end:
                return f"putting the document back failed, too: {error}"
            await asyncio.sleep(1)
    if flip.old is not None and flip.served is None:  # it is not known what they should serve
        waits: list[Coroutine[Any, Any, Any]] = [_settled(replica, flip.new.name, BACK_S) for replica in replicas]
    else:
        waits = [_serves(replica, flip.new.name, flip.served, tell, BACK_S) for replica in replicas]
    ended = await asyncio.gather(*waits, return_exceptions=True)
    missing = [replica.name for replica, one in zip(replicas, ended, strict=True) if isinstance(one, BaseException)]
    return "the document says again what it said before" + (f"; not there yet: {', '.join(missing)}" if missing else "")


async def _whatever_comes(work: Coroutine[Any, Any, Any]) -> Any:
    """Return what `work` returns when it has ended: cancellations change nothing."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    return task.result()
