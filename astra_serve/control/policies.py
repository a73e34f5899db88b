"""The policies of reinforcement learning: adapters that a trainer replaces at every step, kept out of the document.

A policy is an alias like any other: its versions are content-addressed, stored, admitted and proved in the engine
before the first request, and a request ends on the version that it was admitted with. Different from an adapter of the
document:

- it may change nothing: that of the first step has B = 0. Its proof is then that the engine adapts all of its modules,
  and computes finite answers with it;
- its proof is computed like a user's request, not behind them: the trainer waits for it;
- it has no history, is never written to the document, and ends with the server;
- there are at most `most` names. One more takes the place of the policy that was used least recently and has no request
  that runs or waits; if there is none, it is refused.

Loads have one order, one after the other, so that the disk has at most the versions of all names, those that running
requests use (they are in the engine's memory), and the one that is loaded. The rest is removed before each load, and
every `EVERY_S` seconds.

A name belongs to the document or to a trainer. A policy under a name of the document is refused; an entry of the
document that takes the name of a policy replaces the policy.
"""

import asyncio
import logging
from pathlib import Path

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Alias, Version
from astra_serve.control.control import reason_of
from astra_serve.control.preparation import Preparation
from astra_serve.control.status import Phase, Status
from astra_serve.document import desired
from astra_serve.errors import NotPublished, ServeError, UnknownAdapter
from converter.errors import AstraError

EVERY_S = 5.0  # between two collections of the store

logger = logging.getLogger("vllm.astra_serve")


class Policies:
    """The policies of one server."""

    def __init__(
        self, fleet: Fleet, preparation: Preparation, store: Store, clock: Clock, *, most: int, drain_s: float
    ) -> None:
        """`preparation` adds versions to `store`, which has nothing else.

        Requests have `drain_s` seconds to end when their policy is unloaded.
        """
        self.fleet = fleet
        self._preparation, self._store, self._clock = preparation, store, clock
        self._most, self._drain_s = most, drain_s
        self._aliases: dict[str, Alias] = {}
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Remove the versions that nothing needs from the store, until cancelled."""
        fault = ""
        while True:
            await self._clock.sleep(EVERY_S)
            async with self._turn:
                try:
                    await self._collect()
                    fault = ""
                except OSError as error:  # the next time may be better
                    if str(error) != fault:
                        logger.warning("old policies cannot be removed from the store: %s", error)
                    fault = str(error)

    async def load(self, name: str, path: str) -> Version:
        """Return the version of the LoRA in the folder `path` once `name` serves it.

        Raises BadDocument for a name that cannot be, NotPublished with the reason where the version cannot be served,
        and ServeError where the name is another adapter's, or all policies are in use.
        """
        entry = desired.entry({"name": name, "source": path, "allow_no_effect": True})
        if not Path(path).is_absolute():  # a URL, too: a trainer's files are in a folder of --adapter-root
            raise NotPublished(f"{name!r} was not loaded: {path!r:.200} is no absolute path of a folder")
        async with self._turn:
            self._check_free(name)
            status = Status(entry, self.fleet.events, self._clock)
            try:
                await self._collect()
                async with self._preparation.hold(entry, status) as prepared:
                    self._check_free(name)  # the document may have changed meanwhile
                    self._make_room(name)
                    self._aliases[name] = Alias(prepared.current, source=path, lasting=False)
                    self.fleet.point(name, self._aliases[name], self._drain_s)
                    status.enter(Phase.SERVING, version=prepared.current.name)
                return prepared.current
            except (AstraError, OSError) as error:
                reason = reason_of(error)
                status.enter(Phase.FAILED, reason)
                raise NotPublished(f"{name!r} was not loaded: {reason}") from error

    def unload(self, name: str) -> None:
        """Serve nothing under `name` any more; running requests end on their version. Raises ServeError."""
        if name not in self.served():
            if name in self.fleet.expected or name in self.fleet.aliases:
                raise ServeError(f"{name!r} is no policy, but an adapter of the document: it stays")
            raise UnknownAdapter(f"there is no policy {name!r}")
        self._drop(name, "unloaded by the trainer")

    def served(self) -> dict[str, Version]:
        """Return the version of each policy."""
        aliases = self.fleet.aliases
        self._aliases = {name: alias for name, alias in self._aliases.items() if aliases.get(name) is alias}
        return {name: alias.current for name, alias in self._aliases.items()}

    def _check_free(self, name: str) -> None:
        if name in self.fleet.expected or (name in self.fleet.aliases and name not in self.served()):
            raise ServeError(f"{name!r} is an adapter of the document: load the policy under another name")

    def _make_room(self, name: str) -> None:
        """Drop the policy that was used least recently, if there are too many with `name`. Raises ServeError."""
        served = self.served()
        if name in served or len(served) < self._most:
            return
        residences = {other: self.fleet.residency.of(version) for other, version in served.items()}
        idle = [other for other, one in residences.items() if not (one.leases or one.waiters)]
        if not idle:
            raise ServeError(
                f"all {self._most} policies have requests that run: unload one, or start the server with more "
                "--resident"
            )
        oldest = min(idle, key=lambda other: residences[other].last_used)
        self._drop(oldest, f"there are more than {self._most} policies (--resident)")

    def _drop(self, name: str, reason: str) -> None:
        version = self._aliases.pop(name).current
        self.fleet.drop(name, self._drain_s)
        self.fleet.events.emit(Event(name, "removed", version.name, reason))

    async def _collect(self) -> None:
        """Remove the versions from the store that no name and no request needs. Raises OSError."""
        self._store.begin_collection()
        needed = {*self.served().values(), *(residence.version for residence in self.fleet.residency.loaded())}
        await asyncio.to_thread(self._store.collect, {version.digest for version in needed}, 0)
