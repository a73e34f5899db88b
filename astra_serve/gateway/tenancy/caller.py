"""The tenant of the running request: what it may see, and the salt of its prompts.

An adapter that a tenant may not use does not exist for it: its requests take the path of a name that nobody has.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from astra_serve.document.keys import Tenant

ALL = "_all"  # the tenant of servers without a keys document, and of --api-key; no document's tenant can be called so


@dataclass(frozen=True)
class Caller:
    """A tenant, and the salt of the prefix cache that its requests share; None: the cache of all that have none."""

    name: str = ALL
    tenant: Tenant | None = None  # None: everything is allowed, without limits
    cache_salt: str | None = None
    trains: bool = False  # on the policy port: it uses every model, and reads no tenant's usage

    @property
    def weight(self) -> float:
        """Return its share of a full engine, relative to others."""
        return self.tenant.weight if self.tenant else 1.0

    @property
    def may_use_base(self) -> bool:
        """Return whether the base exists for it."""
        return self.tenant is None or self.tenant.base

    @property
    def may_read_usage(self) -> bool:
        """Return whether it may read its own usage."""
        return self.tenant.usage if self.tenant else not self.trains

    @property
    def may_read_metrics(self) -> bool:
        """Return whether it may read what names other tenants and their adapters."""
        return self.tenant is None or self.tenant.metrics

    def sees(self, adapter: str) -> bool:
        """Return whether an adapter of this name exists for it, if it exists."""
        return self.tenant is None or self.tenant.may_use(adapter)

    def may_ask_for(self, model: str) -> bool:
        """Return whether a request may name `model`: an adapter's `name`, or `name@digest-prefix`."""
        name, at, _ = model.partition("@")
        return self.sees(name) and (not at or self.tenant is None or self.tenant.pinned_versions)


EVERYTHING = Caller()
TRAINER = Caller(trains=True)
current: ContextVar[Caller] = ContextVar("caller", default=EVERYTHING)  # of the request that is being handled
