"""One request to a model, from its admission to its last byte: the facts that are logged, counted and aborted by."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from astra_serve.adapters.defaults import Defaults
from astra_serve.adapters.version import Version
from astra_serve.gateway.tenancy.caller import EVERYTHING, Caller

DISCONNECTED = 499  # the status of a request whose client had gone before it was computed; no client sees it
CLOSING_S = 10.0  # for the engine to end the work of a request that was aborted

current: ContextVar["Request | None"] = ContextVar("request", default=None)  # the one that is being handled


async def _never() -> None:
    await asyncio.Event().wait()


@dataclass(eq=False)
class Request:
    """The facts of a request; `current` is the one that runs."""

    id: str
    path: str
    model: str  # as the client wrote it
    task: "asyncio.Task[object]"
    adapter: str | None = None  # the adapter's name in `model`; None for the base, and for an unknown name
    version: Version | None = None  # that serves it; None for the base, and before the lease
    handle: object = None  # the engine's, of that version
    defaults: Defaults = field(default_factory=Defaults)  # of that version
    caller: Caller = EVERYTHING  # whose request it is
    status: int | None = None
    streams: bool = False
    answer_headers: list[tuple[bytes, bytes]] = field(default_factory=list)  # beside those of the handler
    complete: bool = False  # the last byte was sent
    disconnected: bool = False  # the client closed the connection before that, or cancelled the background work
    broke: bool = False  # the engine failed it, or it was past its deadline
    over: bool = False  # nothing may be computed for it any more
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the prefix cache
    output_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)  # per prompt, since the request arrived
    between_tokens_s: list[float] = field(default_factory=list)  # per answer, the mean
    began: float = field(default_factory=time.monotonic)
    computing: set[str] = field(default_factory=set)  # the engine's ids of the work for it
    background: "set[asyncio.Task[object]]" = field(default_factory=set)  # go on after the last byte
    on_first_token: "list[Callable[[Request, float], None]]" = field(default_factory=list)
    on_tokens: list[Callable[[int, int], None]] = field(default_factory=list)  # with those of its prompt, and output
    # Waits until the client disconnects; for as long as no handler reads.
    left: Callable[[], Coroutine[Any, Any, None]] = _never
    waits: bool = False  # for a place in the engine
    engine_priority: int = 0  # behind requests of a smaller number, in the engine's own queue
    _computed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seconds(self) -> float:
        """Return the seconds since it arrived."""
        return time.monotonic() - self.began

    @property
    def outcome(self) -> str:
        """Return ok, client_error, server_error or cancelled."""
        if self.status == DISCONNECTED:
            return "cancelled"
        if self.status is not None and 400 <= self.status < 500:
            return "client_error"
        if self.broke or (self.status is not None and self.status >= 500):
            return "server_error"
        return "ok" if self.complete and not self.disconnected else "cancelled"

    def first_token(self, seconds: float) -> None:
        """Note that the first token of an answer was computed, `seconds` after the request arrived."""
        self.first_token_s.append(seconds)
        for subscriber in self.on_first_token:
            subscriber(self, seconds)

    def tokens(self, prompt: int, output: int) -> None:
        """Note that the engine has computed so many tokens of a prompt, and of its answers."""
        for subscriber in self.on_tokens:
            subscriber(prompt, output)

    @contextmanager
    def computes(self, engine_id: str) -> Iterator[None]:
        """Note that the engine computes for this request while the block runs."""
        self.computing.add(engine_id)
        self._computed.clear()
        try:
            yield
        finally:
            self.computing.discard(engine_id)
            if not self.computing:
                self._computed.set()

    async def computed(self) -> bool:
        """Wait until the engine computes nothing for it any more, at most CLOSING_S; return whether that is so."""
        try:
            if self.computing:
                await asyncio.wait_for(self._computed.wait(), CLOSING_S)
        except TimeoutError:
            return False
        return True
