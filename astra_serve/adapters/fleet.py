"""The public names, the versions that they point at, and the leases of requests.

A name is an alias of one version, and of a canary beside it. A request resolves its name once, when it is admitted, and
holds a lease on that version until its last byte. `residency` loads the version before the lease begins, and evicts it
when nothing needs it any more.
"""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from astra_serve.adapters.events import Events
from astra_serve.adapters.residency import Residency
from astra_serve.adapters.schedule import Residence
from astra_serve.adapters.version import Alias, Version
from astra_serve.errors import Unavailable

SHORTEST_PREFIX = 6  # hexadecimal digits by which a request may name a version


class Fleet:
    """The adapters of one engine by their names."""

    def __init__(self, base_name: str, residency: Residency, events: Events) -> None:
        self.base_name, self.residency, self.events = base_name, residency, events
        self.aliases: dict[str, Alias] = {}
        self.expected: set[str] = set()  # names of the desired state, served or not yet
        self.requests: dict[str, Counter[Version]] = {}  # for the bare name, since its alias changed

    def known(self, model: str) -> str | None:
        """Return the name in `model` (`name` or `name@digest-prefix`) if the desired state has it."""
        name = model.partition("@")[0]
        return name if name in self.aliases or name in self.expected else None

    def resolve(self, model: str, caller: str = "") -> Version | None:
        """Return the version that `model` (`name` or `name@digest-prefix`) points at now, or None.

        Beside a canary, a hash of the caller decides: the same caller gets the same version.
        """
        name, at, prefix = model.partition("@")
        alias = self.aliases.get(name)
        if alias is None:
            return None
        if at:
            found = {v for v in alias.versions() if v.digest.removeprefix("sha256:").startswith(prefix)}
            return found.pop() if len(found) == 1 and len(prefix) >= SHORTEST_PREFIX else None
        if alias.canary and _share(f"{name}\0{caller}") < alias.weight:
            return alias.canary
        return alias.current

    @asynccontextmanager
    async def lease(self, model: str, caller: str = "") -> AsyncIterator[Residence | None]:
        """Keep the version that `model` points at now in the engine until the block ends; None where it is unknown.

        Raises Unavailable where the version cannot be loaded, or not in time, or the name is not served yet.
        """
        version = self.resolve(model, caller)
        if version is not None:
            if model == version.alias:
                self.requests[model][version] += 1
            async with self.residency.lease(version) as residence:
                yield residence
        elif model.partition("@")[0] in self.expected - self.aliases.keys():
            raise Unavailable(f"{model} is not served yet", retry_after_s=5)
        else:
            yield None

    def point(self, name: str, alias: Alias, drain_s: float) -> None:
        """Let `name` point at `alias` from now on; requests that use the versions before have `drain_s` to end."""
        old = self.aliases.get(name)
        self.requests[name] = Counter()
        self.aliases[name] = alias  # the flip: the next request is served by the new version
        for version in alias.serving():
            self.residency.keep(version, pinned=alias.pinned)
        for version in {*(old.versions() if old else ()), *alias.previous} - set(alias.serving()):
            self.residency.retire(version, drain_s)

    def drop(self, name: str, drain_s: float) -> None:
        """Serve nothing under `name` any more."""
        del self.requests[name]
        for version in set(self.aliases.pop(name).versions()):
            self.residency.retire(version, drain_s)

    def named(self) -> set[Version]:
        """Return the versions that a request may name."""
        return {version for alias in self.aliases.values() for version in alias.versions()}


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
