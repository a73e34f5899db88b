"""A new version on every replica, or on none.

    prepare   every replica fetches, checks and loads it, and proves it on its engine; no name means it yet
    verify    it is the same version everywhere
    flip      the document names it, by its digest
    serve     every replica has read the document, and serves it

Whatever goes wrong, a signal included, the document says again what it said before, and the replicas serve that. A
rollout that is killed leaves one document or the other, whole, and the replicas follow it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astra_serve import desired
from astra_serve.desired import Adapter
from astra_serve.errors import BadDocument, ServeError, first_line
from astra_serve.replicas import Replica, of_all

POLL_S = 0.2
BACK_S = 60.0  # for a store that fails to take the document back, and for replicas to serve what they served before
KEPT = {"required", "pin", "allow_no_effect"}  # of an entry whose version changes

Tell = Callable[[str, str], None]  # the step, and what happened


async def prepare(name: str, wanted: dict[str, Any], replicas: Sequence[Replica], tell: Tell, timeout_s: float) -> str:
    """Have every replica prove the version that `wanted` means, and return its digest.

    `wanted` is the body of `PUT /prepared/NAME`. Raises ServeError where one of them cannot, or they differ.
    """

    async def one(replica: Replica) -> str:
        version = await replica.ask("PUT", f"/prepared/{name}", wanted, timeout_s)
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
    where, old = await _document(name, replicas, where)
    served = await of_all(replicas, lambda replica: _settled(replica, name, timeout_s))
    digests = {adapter["version"]["digest"] for adapter in served if adapter and adapter["version"]}
    as_said = len(digests) == 1 and all(adapter and adapter["state"] == "serving" for adapter in served)
    kept = old.model_dump(include=KEPT, exclude_defaults=True) if old else {}
    try:
        digest = await prepare(name, {**kept, **wanted}, replicas, tell, timeout_s)
    except ServeError as error:
        raise ServeError(f"{error}; nothing was changed") from error
    previous = desired.previous([*digests, *(old.previous if old else [])], digest)
    new = desired.entry({"name": name, **kept, **wanted, "digest": digest, "previous": previous})
    flip = Flip(where, old, new)
    writing = asyncio.create_task(asyncio.to_thread(flip.write))
    try:
        await asyncio.shield(writing)
        tell("flip", where)
        await of_all(replicas, lambda replica: _serves(replica, name, digest, tell, timeout_s))
        await asyncio.to_thread(flip.check)
        return new
    except BaseException as error:
        await _whatever_comes(asyncio.wait([writing]))  # a thread is not cancelled
        if not flip.written:
            raise
        tell("back", f"{str(error) or 'told to stop'}: the document is put back, which may take a moment")
        how = await _whatever_comes(_go_back(flip, digests.pop() if as_said else None, replicas, tell))
        if isinstance(error, ServeError):
            raise ServeError(f"{error}; {how}") from error
        tell("back", how)
        raise


@dataclass
class Flip:
    """One change of the document at `where`: an entry from `old` to `new`, None being no entry, and back."""

    where: str
    old: Adapter | None
    new: Adapter
    written: bool = False  # or perhaps written
    _text: str = ""  # as it was
    _changed: str = ""

    def write(self) -> None:
        """Let the document say `new`. Raises ServeError where it does not say `old` any more, or cannot be changed."""
        with _locked(self.where):
            self._text = _read(self.where)
            changed = desired.parse(self._text, self.where).replacing(self.new.name, self.old, self.new)
            self._changed = desired.dump(changed)
            self.written = True
            _save(self._changed, self.where)

    def back(self, digest: str | None) -> str | None:
        """Let the document say what it said, or return why there is nothing to do. Raises ServeError.

        An entry that named no version gets the `digest` that was served: its source may say something else by now.
        """
        with _locked(self.where):
            text = _read(self.where)
            document = desired.parse(text, self.where)
            if document.get(self.new.name) == self.old:
                return "the document is as before"
            if document.get(self.new.name) != self.new:
                return "the document is as somebody else has left it"
            back = self.old
            if back and not back.digest:
                back = back.model_copy(update={"digest": digest})
            if back == self.old and text == self._changed:
                _save(self._text, self.where)  # with its comments
            else:
                _save(desired.dump(document.replacing(self.new.name, self.new, back)), self.where)
            return None

    def check(self) -> None:
        """Raise ServeError unless the document still says `new`: where no lock holds, another writer may undo it."""
        if desired.parse(_read(self.where), self.where).get(self.new.name) != self.new:
            raise BadDocument(f"somebody else has changed {self.new.name!r} in the document meanwhile")


@contextmanager
def _locked(where: str) -> Iterator[None]:
    try:
        with desired.lock(where):
            yield
    except OSError as error:
        raise ServeError(f"the document at {where} cannot be locked: {first_line(error)}") from error


async def _document(name: str, replicas: Sequence[Replica], where: str | None) -> tuple[str, Adapter | None]:
    """Return where the document is and what it says of `name`. Raises ServeError unless all follow what is there."""
    found = await of_all(replicas, Replica.refresh)
    places = {str(document["where"]) for document in found}
    if where is None and len(places) > 1:
        raise ServeError(f"the replicas follow different documents: {', '.join(sorted(places))}")
    where = where or places.pop()
    try:
        desired.check_writable(where)
    except ServeError as error:
        raise ServeError(f"{error}; `prepare` first, and `status --wait` after that") from error
    text = await asyncio.to_thread(_read, where)
    for replica, document in zip(replicas, found, strict=True):
        if document["digest"] == desired.digest(text):
            continue
        if "://" not in where and not Path(where).exists():
            raise ServeError(
                f"the replicas' document is {where}, which is not there as seen from here: give --document; where it "
                "is a ConfigMap `prepare`, change it, and wait with `status --wait`"
            )
        raise ServeError(f"{replica.name} does not follow the text at {where}: is it the same document?")
    return where, desired.parse(text, where).get(name)


def _read(where: str) -> str:
    try:
        return desired.read(where)
    except Exception as error:  # each store has errors of its own
        raise ServeError(f"the document at {where} cannot be read from here: {first_line(error)}") from error


def _save(text: str, where: str) -> None:
    try:
        desired.save(text, where)
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
    await replica.refresh()
    found = await _settled(replica, name, timeout_s)
    version = found and found["version"]
    if found and found["state"] == "failed":
        raise ServeError(f"{replica.name} does not serve it: {found['reason']}")
    if (version and version["digest"]) != digest:
        raise ServeError(f"{replica.name} serves {version['name'] if version else 'nothing'} all the same")
    if version:
        tell("serve", f"{replica.name} serves {version['name']}")


async def _go_back(flip: Flip, digest: str | None, replicas: Sequence[Replica], tell: Tell) -> str:
    """Put the document back, wait for the replicas that answer, and say how that went.

    `digest` is what all of them served; None where it was not one, or not what the document said.
    """
    end = asyncio.get_running_loop().time() + BACK_S
    while True:
        try:
            if nothing := await asyncio.to_thread(flip.back, digest):
                return nothing
            break
        except ServeError as error:
            if asyncio.get_running_loop().time() > end:
                return f"putting the document back failed, too: {error}"
            await asyncio.sleep(1)
    if flip.old is not None and digest is None:  # it is not known what they should serve
        waits: list[Coroutine[Any, Any, Any]] = [_settled(replica, flip.new.name, BACK_S) for replica in replicas]
    else:
        waits = [_serves(replica, flip.new.name, digest, tell, BACK_S) for replica in replicas]
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
