"""The models that exist for one tenant: others' adapters have no name here, and take the path of unknown names."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.schedule import Owner, Residence
from astra_serve.adapters.version import Version
from astra_serve.errors import Unavailable, UnknownAdapter
from astra_serve.gateway.tenancy.caller import Caller


class View:
    """A fleet as one tenant sees it."""

    def __init__(self, fleet: Fleet, caller: Caller) -> None:
        self._fleet, self._caller = fleet, caller

    def has(self, model: str) -> bool:
        """Return whether a request may name `model`, which may exist or not."""
        return self._caller.may_use_base if model == self._fleet.base_name else self._caller.may_ask_for(model)

    def names(self) -> list[str]:
        """Return the base and the adapters that are served."""
        return [name for name in (self._fleet.base_name, *self._fleet.aliases) if self.has(name)]

    def known(self, model: str) -> str | None:
        """Return the adapter's name in `model` if the desired state has it."""
        return self._fleet.known(model) if self.has(model) else None

    def resolve(self, model: str) -> Version | None:
        """Return the version that `model` points at now, or None."""
        return self._fleet.resolve(model) if self.has(model) else None

    @asynccontextmanager
    async def lease(self, model: str, share_by: str) -> AsyncIterator[Residence | None]:
        """Keep the version of `model` in the engine until the block ends; None for the base.

        Raises UnknownAdapter and Unavailable.
        """
        if not self.has(model):
            raise self.unknown(model)
        owner = Owner(self._caller.name, self._caller.weight)
        async with self._fleet.lease(model, share_by, self.has, owner) as residence:
            yield residence

    def unknown(self, model: str) -> UnknownAdapter | Unavailable:
        """Return the error of a request for a name that points at nothing."""
        return self._fleet.unknown(model, self.has)
