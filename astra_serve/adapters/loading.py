"""How the engine reads one version: verified in the store, admitted, loaded and proved, in this order."""

import asyncio
import logging
from pathlib import Path
from typing import Any

from astra_serve.adapters.admission import Base
from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event, Events
from astra_serve.adapters.probe import Proof, Prover
from astra_serve.adapters.protocol import Engine
from astra_serve.adapters.schedule import Residence, State
from astra_serve.adapters.served import Served
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Version
from astra_serve.errors import ServeError
from converter.errors import AstraError, without_secrets

logger = logging.getLogger("vllm.astra_serve")


class Loader:
    """Loads versions of a store, and of one whose versions end with the server, into one engine."""

    def __init__(
        self, engine: Engine, store: Store, base: Base, events: Events, clock: Clock, passing: Store | None = None
    ) -> None:
        self._engine, self._events, self._clock = engine, events, clock
        self._stores = [store, passing] if passing else [store]
        self._served = {one: Served(one, base) for one in self._stores}
        self._prover = Prover(engine)

    async def load(self, residence: Residence) -> dict[str, float]:
        """Load and prove a version, set its handle and proof, and return the seconds of its parts.

        A version that was proved before is admitted already: only a publication proves it again, with one prompt.
        Raises ServeError, AdapterError and OSError; `residence.handle` is set then if the engine has it. Errors name
        the source of the version, not its folder in the store.
        """
        try:
            return await self._load(residence)
        except AstraError as error:
            digest, text = residence.version.digest, str(error)
            folders = [str(folder(digest)) for one in self._stores for folder in (one.folder, one.engine_folder)]
            if not any(folder in text for folder in folders):
                raise
            source = next(filter(None, (one.source(digest) for one in self._stores)), None)
            shown = without_secrets(source) if source else residence.version.name
            for folder in folders:
                text = text.replace(folder, shown)
            raise type(error)(text) from error

    async def _load(self, residence: Residence) -> dict[str, float]:
        version = residence.version
        self._events.emit(Event(version.alias, "loading", version.name))
        began = self._clock.now()
        store = self._store_of(version)
        read = self._served[store].folder
        folder, admitted = await asyncio.to_thread(read, version.digest, admit=residence.proof is None)
        if admitted is not None:
            for note in admitted.notes():
                logger.warning("%s: %s", version.name, note)
            residence.defaults = admitted.defaults
            residence.adapts_head = any(module.endswith("lm_head") for module in admitted.modules)
        residence.handle = await self._engine.load(version.name, folder)
        loaded = self._clock.now()
        residence.state = State.PROBING
        self._events.emit(Event(version.alias, "probing", version.name))
        # A request or a trainer waits: its probe is not computed behind all other requests.
        urgent = residence.urgent or not residence.for_publication
        if residence.proof and not (residence.proof.of_an_effect or residence.allow_no_effect):
            residence.proof = None  # proved earlier with `allow_no_effect`; that permission is gone now
        if residence.proof is None:
            residence.proof = await self._proved(residence, store.folder(version.digest), urgent=urgent)
        elif any(waiter.publication for waiter in residence.waiters):
            await self._prover.again(residence.handle, residence.proof, urgent=urgent)
        else:
            return {"loading": loaded - began}
        return {"loading": loaded - began, "probing": self._clock.now() - loaded}

    async def _proved(self, residence: Residence, folder: Path, *, urgent: bool) -> Proof:
        """Return the proof of a version that was loaded for the first time. Raises ServeError."""
        may_change_nothing = residence.allow_no_effect
        # At the same time: each call waits until the engine has ended the step that it computes.
        left_out, proof = await asyncio.gather(
            self._engine.left_out(residence.handle),
            self._prover.prove(residence.handle, folder, may_change_nothing=may_change_nothing, urgent=urgent),
            return_exceptions=True,
        )
        if isinstance(left_out, BaseException):
            raise left_out
        if left_out:
            raise ServeError(
                f"the engine does not adapt {len(left_out)} of its modules: {', '.join(left_out[:8])}; see "
                "--lora-target-modules, and vLLM's list of modules for this base"
            )
        if isinstance(proof, BaseException):
            raise proof
        return proof

    async def unload(self, handle: Any) -> None:
        """Let the engine forget an adapter. Raises ServeError."""
        await self._engine.unload(handle)

    async def in_slots(self) -> set[str]:
        """Return the names of the versions that have a slot of the engine's batches. Raises ServeError."""
        return await self._engine.in_slots()

    def stored(self, version: Version) -> bool:
        """Return whether a store has a version."""
        return any(version.digest in one for one in self._stores)

    def _store_of(self, version: Version) -> Store:
        return next((one for one in self._stores if version.digest in one), self._stores[0])
