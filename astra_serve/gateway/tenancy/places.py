"""The places of a full engine: a request that has its version waits here until a place is free for its tenant.

The engine computes `--max-num-seqs` sequences at a time, in the order in which it gets them: what is in its own queue
is beyond any fairness. The gateway therefore hands over only requests that the engine has a place for, in the order of
`fair_counter`. A request takes prompts x `n` places, at most all, from its dispatch to its end.

- A place is free: the request whose turn is next takes it. One with several sequences takes them all at once; where
  fewer places are free, or more than all are needed, the engine computes its sequences behind those of others.
- Tokens are charged when they are computed: a prompt when the engine gets it, an answer at each step where it is
  streamed, and at its end otherwise.
- `kept` places are for tenants that have nothing running: one that asks now and then begins at the next step. Nobody
  passes a tenant whose turn is next, so that it cannot be used to get more than one's share.
- The engine has `slots` for adapters in a batch (--max-loras). A request for one more adapter closes a slot: one of the
  tenant that has most of them for its weight, and of these the one used for the longest time. Requests for the adapter
  in it wait behind the request that needs the slot; all others pass. Another slot is closed after `CLOSED_S`. The bound
  of `fair_counter` does not count these waits.

A request waits as long as its client does: it leaves the queue when the client disconnects, or when it is cancelled at
the drain deadline of its version or of the server. No tenant waits for ever: each one served rises, until it is not the
next any more. Requests that nothing is computed for (/tokenize, /detokenize, count_tokens, cancellations) pass.

All this is for servers with tenants (`--keys`); without, requests go to the engine as they arrive. Requests with a key
of --api-key, and of the policy port, are those of one tenant of weight 1. Probes pass by: see `engine.vllm`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect

from astra_serve.gateway.limits import sequences
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.fair_counter import INPUT, OUTPUT, FairCounter, Turn

FROM_PLACES = 16  # an engine with so many keeps one of them free: a sixteenth of the places, and less of the tokens
CLOSED_S = 10.0  # for the requests of a closed slot to end, before another one is closed instead
SURPLUS = 1  # engine priority of a request with more sequences than places were free; all others have 0
PASSING = ("/tokenize", "/detokenize", "/count_tokens", "/cancel")  # the ends of paths that compute nothing


@dataclass(eq=False)
class _Claim:
    """What one request takes."""

    request: Request
    sequences: int
    places: int
    version: str | None  # that needs a slot; None: the base
    granted: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class _Slot:
    """The running requests of one version in the engine's batches."""

    since: float  # when it was opened or closed
    closed: bool = False
    turns: list[Turn[_Claim]] = field(default_factory=list)

    def tenants(self) -> dict[str, float]:
        """Return the weights of the tenants that use it."""
        return {turn.names[0]: turn.tenant.weight for turn in self.turns}


class Places:
    """The places of one engine."""

    def __init__(
        self,
        places: int,
        slots: int | None = None,
        kept: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`slots`: adapters in a batch, None: any number; `kept`: places for tenants with nothing running."""
        self._places, self._slots, self._now = places, slots, now
        self._kept = int(places >= FROM_PLACES) if kept is None else kept
        self._used = 0
        self._counter: FairCounter[_Claim] = FairCounter()
        self._used_slots: dict[str, _Slot] = {}  # by version

    @asynccontextmanager
    async def place(self, request: Request, content: Mapping[str, Any]) -> AsyncIterator[None]:
        """Hold the places of a request. Raises ClientDisconnect if the client leaves before it has them."""
        if request.path.endswith(PASSING):
            yield
            return
        number, version = sequences(content), request.version.name if request.version else None
        claim = _Claim(request, number, min(number, self._places), version)
        turn = self._counter.add(request.caller.name, request.caller.weight, request.adapter or "", claim)
        self._dispatch()
        await self._granted(turn)
        charge = partial(self._charge, turn)
        request.on_tokens.append(charge)
        try:
            yield
        finally:
            request.on_tokens.remove(charge)
            self._give_back(turn)

    async def _granted(self, turn: Turn[_Claim]) -> None:
        request, granted = turn.item.request, turn.item.granted
        if granted.done():
            return
        request.waits = True
        left = asyncio.create_task(request.left())
        try:
            await asyncio.wait((granted, left), return_when=asyncio.FIRST_COMPLETED)
            if not granted.done():
                await left
                raise ClientDisconnect
        except BaseException:
            if granted.done():
                self._give_back(turn)
            else:
                self._counter.remove(turn)
                self._dispatch()
            raise
        finally:
            request.waits = False
            left.cancel()

    def _charge(self, turn: Turn[_Claim], prompt: int, output: int) -> None:
        self._counter.charge(turn, INPUT * prompt + OUTPUT * output)

    def _give_back(self, turn: Turn[_Claim]) -> None:
        self._used -= turn.item.places
        self._counter.done(turn)
        if (version := turn.item.version) is not None:
            self._used_slots[version].turns.remove(turn)
            if not self._used_slots[version].turns:
                del self._used_slots[version]
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand over the requests that the engine has places for."""
        while (turn := self._next()) is not None:
            claim = turn.item
            if claim.sequences > self._places - self._used:
                claim.request.engine_priority = SURPLUS
            self._used += claim.places
            self._counter.take(turn)
            if claim.version is not None:
                self._used_slots.setdefault(claim.version, _Slot(self._now())).turns.append(turn)
            claim.granted.set_result(None)

    def _next(self) -> Turn[_Claim] | None:
        """Return the request to hand over now, if there is one."""
        needed = False  # a request that the engine has a place for waits for a slot
        for turn in self._counter.turns():
            if self._used + (0 if turn.alone else self._kept) >= self._places:
                return None
            version = turn.item.version
            if version is None or self._slots is None:
                return turn
            if slot := self._used_slots.get(version):
                if not (needed and slot.closed):
                    return turn
            elif len(self._used_slots) < self._slots:
                return turn
            elif not needed:
                needed = True
                self._close_one()
        return None

    def _close_one(self) -> None:
        """Close the slot used for the longest time of the tenant that has most of them, unless one is closed."""
        now = self._now()
        for slot in self._used_slots.values():
            if slot.closed and now < slot.since + CLOSED_S:
                return
            if slot.closed:  # one long answer keeps it
                slot.closed, slot.since = False, now
        held: dict[str, float] = {}
        for slot in self._used_slots.values():
            for name, weight in slot.tenants().items():
                held[name] = held.get(name, 0.0) + 1 / weight
        most = max(
            self._used_slots.values(), key=lambda slot: (min(held[name] for name in slot.tenants()), -slot.since)
        )
        most.closed, most.since = True, now
