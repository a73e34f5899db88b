"""An adapter's immutable version as this process knows it, and what a public name means."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from astra_serve.adapters.probe import Proof


@dataclass(eq=False)
class Version:
    """One immutable version of an adapter, under the name that it serves; `Fleet.version` makes them."""

    alias: str
    digest: str
    pinned: bool = False
    may_change_nothing: bool = False
    handle: Any = None  # while the engine has it, and it was proved there
    proof: Proof | None = None
    failed: str | None = None
    adapts_head: bool = False  # lm_head: the engine gives no prompt_logprobs with it
    last_used: float = 0.0
    loaded_at: float = 0.0
    leaving: bool = False  # it is to make room: requests that come now wait, until it is gone or may stay
    requests: set[asyncio.Task[Any]] = field(default_factory=set)  # that hold a lease, or wait for one
    served: int = 0  # how many of them the engine may be computing for
    coming: int = 0  # how many are about to let a name mean it
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # set while nobody holds it
    loading: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Return what answers call it, and requests may."""
        return f"{self.alias}@{self.digest.removeprefix('sha256:')[:12]}"


@dataclass
class Alias:
    """A public name: what it means now, what it may go back to, and who else gets a share of its requests."""

    current: Version
    previous: list[Version] = field(default_factory=list)
    canary: Version | None = None
    weight: float = 0.0

    def versions(self) -> Iterator[Version]:
        """Yield every version that a request may name."""
        yield self.current
        if self.canary:
            yield self.canary
        yield from self.previous
