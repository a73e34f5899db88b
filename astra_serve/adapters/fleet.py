"""The public names, the versions that they point at, and the leases of requests.

A name is an alias of one version, and of a canary beside it. A request resolves its name once, when it is admitted, and
holds a lease on that version until its last byte. `residency` loads the version before the lease begins, and evicts it
when nothing needs it any more.
"""

import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from difflib import get_close_matches
from heapq import nlargest
from operator import eq

from astra_serve.adapters.events import Events
from astra_serve.adapters.residency import NO_TENANT, Residency
from astra_serve.adapters.schedule import Owner, Residence
from astra_serve.adapters.version import Alias, Version
from astra_serve.errors import Unavailable, UnknownAdapter

SHORTEST_PREFIX = 6  # hexadecimal digits by which a request may name a version
LONGEST_NAME = 200  # characters of a name that is compared with the known ones: the time grows with its square
COMPARED = 100  # known names that one unknown name is compared with


def _all(_: str) -> bool:
    return True


class Fleet:
    """The adapters of one engine by their names."""

    def __init__(self, base_name: str, residency: Residency, events: Events) -> None:
        self.base_name, self.residency, self.events = base_name, residency, events
        self.aliases: dict[str, Alias] = {}
        self.expected: set[str] = set()  # names of the desired state, served or not yet
        self.complete = True  # False until the document has been read: names that are unknown now may be in it
        self.since: dict[str, int] = {}  # when the current version of each alias began to serve; seconds since 1970
        self.requests: dict[str, Counter[Version]] = {}  # for the bare name, since its alias changed

    def known(self, model: str) -> str | None:
        """Return the name in `model` (`name` or `name@digest-prefix`) if the desired state has it."""
        name = model.partition("@")[0]
        return name if name in self.aliases or name in self.expected else None

    def resolve(self, model: str, share_by: str = "") -> Version | None:
        """Return the version that `model` (`name` or `name@digest-prefix`) points at now, or None.

        Beside a canary, a hash of `share_by` decides, the user or the id of a request: a user stays with one version.
        """
        name, at, prefix = model.partition("@")
        alias = self.aliases.get(name)
        if alias is None:
            return None
        if at:
            found = {v for v in alias.versions() if v.digest.removeprefix("sha256:").startswith(prefix)}
            return found.pop() if len(found) == 1 and len(prefix) >= SHORTEST_PREFIX else None
        if alias.canary and _share(f"{name}\0{share_by}") < alias.weight:
            return alias.canary
        return alias.current

    @asynccontextmanager
    async def lease(
        self, model: str, share_by: str = "", visible: Callable[[str], bool] = _all, owner: Owner = NO_TENANT
    ) -> AsyncIterator[Residence | None]:
        """Keep the version that `model` points at now in the engine until the block ends; None for the base.

        Its memory counts for the tenant `owner`. An error names no models but those that are `visible`.

        Raises UnknownAdapter, and Unavailable where the version cannot be loaded, or not in time, or the name is not
        served yet.
        """
        version = self.resolve(model, share_by)
        if version is not None:
            if model == version.alias:
                self.requests[model][version] += 1
            async with self.residency.lease(version, owner) as residence:
                yield residence
        elif model == self.base_name:
            yield None
        else:
            raise self.unknown(model, visible)

    def unknown(self, model: str, visible: Callable[[str], bool] = _all) -> UnknownAdapter | Unavailable:
        """Return the error of a request for a name that points at nothing, or at nothing that is `visible`."""
        name = model.partition("@")[0]
        if visible(model) and name in self.expected and name not in self.aliases:  # in this order, as in `_nearest`
            return Unavailable(f"{model} is not served yet", retry_after_s=5)
        shown = repr(model if len(model) <= LONGEST_NAME else f"{model[:LONGEST_NAME]}...")
        if not self.complete:
            return Unavailable(f"the document has not been read, and may have {shown}: ask again", retry_after_s=5)
        nearest = self._nearest(model, visible)
        hint = f"did you mean {nearest!r}?" if nearest else "GET /v1/models lists the models"
        return UnknownAdapter(f"the model {shown} does not exist: {hint}")

    def point(self, name: str, alias: Alias, drain_s: float) -> None:
        """Let `name` point at `alias` from now on.

        A version that is replaced, or leaves the rollback history, is evicted; its requests have `drain_s` seconds to
        end. Other changes of the alias, such as a pin, concern no request.
        """
        old = self.aliases.get(name)
        if old is None or old.current != alias.current:
            self.since[name] = int(time.time())
        self.requests[name] = Counter()
        self.aliases[name] = alias  # the flip: the next request is served by the new version
        for version in alias.serving():
            self.residency.keep(version, pinned=alias.pinned)
        if old is not None:
            replaced = set(old.serving()) - set(alias.serving())
            for version in replaced | (set(old.versions()) - set(alias.versions())):
                self.residency.retire(version, drain_s)

    def drop(self, name: str, drain_s: float) -> None:
        """Serve nothing under `name` any more."""
        del self.requests[name], self.since[name]
        for version in set(self.aliases.pop(name).versions()):
            self.residency.retire(version, drain_s)

    def named(self) -> set[Version]:
        """Return the versions that a request may name."""
        return {version for alias in self.aliases.values() for version in alias.versions()}

    def _nearest(self, model: str, visible: Callable[[str], bool]) -> str | None:
        """Return the name that a request most likely meant: a version of the adapter that it names, or a name."""
        if len(model) > LONGEST_NAME:
            return None
        bare = model.partition("@")[0]
        if visible(bare) and (alias := self.aliases.get(bare)):  # in this order: a hidden name takes no other time
            return alias.current.name if visible(alias.current.name) else bare
        names = [name for name in (self.base_name, *self.aliases) if visible(name)]
        if (inside := next((name for name in names if name.endswith(f"/{bare}")), None)) is not None:
            return inside  # the namespace is missing
        if len(names) > COMPARED:  # in linear time: the names that have the most characters at the same place
            names = nlargest(COMPARED, names, lambda name: sum(map(eq, name, model)))
        return next(iter(get_close_matches(model, names, 1)), None)


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
