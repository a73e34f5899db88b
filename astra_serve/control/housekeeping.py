"""The server's timer: repairs versions that were damaged while they served, and removes old ones from the store."""

import asyncio
import logging
from contextlib import suppress

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store
from astra_serve.control.preparation import Preparation
from astra_serve.control.reconcile import Reconciler
from astra_serve.control.status import Phase
from astra_serve.errors import ServeError

EVERY_S = 5.0
KEEP = 3  # versions that nothing refers to any more

logger = logging.getLogger("vllm.astra_serve")


class Housekeeping:
    """The work that one server does from time to time."""

    def __init__(
        self, fleet: Fleet, store: Store, preparation: Preparation, reconciler: Reconciler, clock: Clock
    ) -> None:
        self._fleet, self._store, self._preparation = fleet, store, preparation
        self._reconciler, self._clock, self._fault = reconciler, clock, ""

    async def run(self) -> None:
        """Do it every 5 s until cancelled."""
        while True:
            await self._clock.sleep(EVERY_S)
            with suppress(ServeError):  # an engine that is silent is not ready, and at last lost
                await self._fleet.residency.look()
            self.repair()
            try:
                await self.collect()
            except OSError as error:  # as a store that is read-only: the next time may be better
                if str(error) != self._fault:
                    logger.warning("old versions cannot be removed from the store: %s", error)
                self._fault = str(error)
            else:
                self._fault = ""

    def repair(self) -> None:
        """Serve the adapters again whose versions have failed since they were served."""
        for status in list(self._reconciler.status.values()):
            alias = self._fleet.aliases.get(status.entry.name)
            if alias and status.phase is Phase.SERVING:
                failures = (self._fleet.residency.of(version).failed for version in alias.serving())
                if reason := next(filter(None, failures), None):
                    status.enter(Phase.FAILED, reason)
                    self._reconciler.want(status.entry, again=True)

    async def collect(self) -> None:
        """Remove the versions from the store that nothing refers to, but for the newest of them. Raises OSError."""
        self._store.begin_collection()
        versions = self._fleet.named() | self._preparation.for_later()
        self._fleet.residency.forget(versions)
        versions |= {residence.version for residence in self._fleet.residency.loaded()}
        kept = {version.digest for version in versions}
        for entry in (status.entry for status in self._reconciler.status.values()):
            kept |= {entry.source, entry.digest or "", entry.canary.version if entry.canary else ""}
            kept |= {step.digest for step in entry.steps}
            kept |= {entry.canary.digest or ""} if entry.canary else set()
        await asyncio.to_thread(self._store.collect, kept, KEEP)
