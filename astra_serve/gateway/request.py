"""One request to a model, from its admission to its last byte: what is logged, counted and aborted."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from astra_serve.adapters.version import Version

CLOSING_S = 10.0  # for the engine to let go of a request that was aborted

current: ContextVar["Request | None"] = ContextVar("request", default=None)  # the one that is being handled


@dataclass(eq=False)
class Request:
    """What is known of a request; `current` is the one that runs."""

    id: str
    path: str
    model: str  # as it was asked for
    task: "asyncio.Task[object]"
    adapter: str | None = None  # the name that `model` is a version of; None for the base, and what nobody knows
    version: Version | None = None  # that serves it; None for the base, and until there is one
    status: int | None = None
    streams: bool = False
    complete: bool = False  # the last byte was sent
    left: bool = False  # the client has gone before that
    broke: bool = False  # the engine failed it, or its time was up
    over: bool = False  # nothing may be computed for it any more
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)  # per prompt, since the request came
    between_tokens_s: list[float] = field(default_factory=list)  # per answer, the mean
    began: float = field(default_factory=time.monotonic)
    computing: set[str] = field(default_factory=set)  # ids of what the engine computes for it
    told: "list[Callable[[Request, float], None]]" = field(default_factory=list)  # of each first token, as it comes
    _computed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seconds(self) -> float:
        """Return how long ago it came."""
        return time.monotonic() - self.began

    @property
    def outcome(self) -> str:
        """Return ok, client_error, server_error or cancelled."""
        if self.status is not None and 400 <= self.status < 500:
            return "client_error"
        if self.broke or (self.status is not None and self.status >= 500):
            return "server_error"
        return "ok" if self.complete and not self.left else "cancelled"

    def first_token(self, seconds: float) -> None:
        """Note that an answer's first token has come, `seconds` after the request."""
        self.first_token_s.append(seconds)
        for tell in self.told:
            tell(self, seconds)

    @contextmanager
    def computes(self, engine_id: str) -> Iterator[None]:
        """Know that the engine computes for this request while the block runs."""
        self.computing.add(engine_id)
        self._computed.clear()
        try:
            yield
        finally:
            self.computing.discard(engine_id)
            if not self.computing:
                self._computed.set()

    async def computed(self) -> bool:
        """Wait until the engine computes nothing for it any more; return whether that came to be."""
        try:
            if self.computing:
                await asyncio.wait_for(self._computed.wait(), CLOSING_S)
        except TimeoutError:
            return False
        return True
