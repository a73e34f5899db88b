"""Places of an engine: requests of several tenants that hold their places until a test ends them."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from astra_serve.adapters.version import Version
from astra_serve.document.keys import Tenant
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.caller import Caller
from astra_serve.gateway.tenancy.places import CLOSED_S, SURPLUS, Places
from tests.astra_serve.world import in_a_loop, quiet


@dataclass
class World:
    """Places, and the requests that have got theirs, in this order, by name: tenant/adapter and a number."""

    places: Places
    dispatched: list[str] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    ends: dict[str, asyncio.Event] = field(default_factory=dict)
    disconnects: dict[str, asyncio.Event] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    async def ask(self, name: str, *, path: str = "/v1/completions", **content: Any) -> "asyncio.Task[None]":
        """Begin a request such as `a/sql1`."""
        task = asyncio.create_task(self._ask(name, path, content))
        await quiet()
        return task

    async def _ask(self, name: str, path: str, content: dict[str, Any]) -> None:
        (tenant, _, adapter), task = name.rstrip("0123456789").partition("/"), asyncio.current_task()
        caller = Caller(tenant, Tenant(name=tenant, weight=self.weights.get(tenant, 1.0)))
        request = Request(name, path, adapter, task, adapter=adapter or None, caller=caller)  # type: ignore[arg-type]
        request.version = Version(adapter, f"sha256:{adapter}") if adapter else None
        self.requests[name], self.ends[name], gone = request, asyncio.Event(), asyncio.Event()
        self.disconnects[name] = gone

        async def left() -> None:
            await gone.wait()

        request.left = left
        async with self.places.place(request, content):
            self.dispatched.append(name)
            await self.ends[name].wait()

    async def end(self, name: str, output: int = 1) -> None:
        """End a request, whose answer has so many tokens."""
        self.requests[name].tokens(0, output)
        self.ends[name].set()
        await quiet()

    def new(self) -> list[str]:
        """Return the requests that have been dispatched since the last call."""
        found, self.dispatched = self.dispatched, []
        return found


@in_a_loop
async def test_requests_wait_until_a_place_is_free_and_the_tenant_that_was_served_least_is_next() -> None:
    w = World(Places(2, kept=0))
    for number in range(4):
        await w.ask(f"a{number}")
    assert w.new() == ["a0", "a1"]
    await w.ask("b0")
    await w.end("a0", 10)
    assert w.new() == ["b0"]
    assert [request.waits for request in w.requests.values()] == [False, False, True, True, False]
    await w.end("b0", 100)
    await w.ask("b1")
    await w.end("a1", 10)
    assert w.new() == ["a2", "a3"]
    await w.end("a2", 100)
    assert w.new() == ["b1"]


@in_a_loop
async def test_the_tokens_of_a_running_stream_count_when_they_are_computed_by_their_weights() -> None:
    w = World(Places(2, kept=0), weights={"a": 2.0})
    for name in ("a0", "b0", "a1", "b1"):
        await w.ask(name)
    w.requests["a0"].tokens(10, 5)  # 10 x 1 + 5 x 2 is 20, by weight 10
    w.requests["b0"].tokens(11, 0)
    w.new()
    await w.end("b0", 0)
    assert w.new() == ["a1"]


@in_a_loop
async def test_within_a_tenant_the_adapter_that_was_served_least_is_next() -> None:
    w = World(Places(1))
    for name in ("a/x0", "a/x1", "a/x2", "a/y0"):
        await w.ask(name)
    await w.end("a/x0", 5)
    assert w.new() == ["a/x0", "a/y0"]


@in_a_loop
async def test_a_place_is_kept_for_a_tenant_that_has_nothing_running() -> None:
    w = World(Places(3, kept=1))
    for number in range(4):
        await w.ask(f"a{number}")
    assert w.new() == ["a0", "a1"]
    await w.ask("b0")
    await w.ask("b1")
    assert w.new() == ["b0"]
    await w.end("b0", 0)
    assert w.new() == ["b1"]  # nothing of it runs any more


@in_a_loop
async def test_the_kept_place_gives_no_tenant_more_than_its_share() -> None:
    w = World(Places(2, kept=1), weights={"b": 0.01})
    for name in ("a0", "b0"):
        await w.ask(name)
    for number in (1, 2):
        await w.ask(f"a{number}")
    await w.end("b0", 10)  # worth 1,000 tokens of `a`
    await w.ask("b1")
    assert w.new() == ["a0", "b0"]
    await w.end("a0", 10)
    assert w.new() == ["a1"]


@in_a_loop
async def test_a_small_engine_keeps_no_place() -> None:
    for places, running in ((15, 15), (16, 15)):
        w = World(Places(places))
        for number in range(20):
            await w.ask(f"a{number}")
        assert len(w.new()) == running


@in_a_loop
async def test_a_request_with_several_sequences_takes_as_many_places_and_those_that_are_too_many_come_last() -> None:
    w = World(Places(4, kept=0))
    await w.ask("a0", prompt=["x", "y"], n=1)
    await w.ask("a1", prompt="x", n=3)
    await w.ask("a2")
    assert w.new() == ["a0", "a1"]
    assert [w.requests[name].engine_priority for name in ("a0", "a1")] == [0, SURPLUS]
    await w.end("a1")
    assert w.new() == ["a2"]
    await w.ask("b0", prompt=["x"] * 100)
    assert w.new() == ["b0"]
    await w.end("b0")
    await w.end("a0")
    await w.ask("a3", prompt=["x"] * 3)
    assert (w.new(), w.requests["a3"].engine_priority) == (["a3"], 0)  # of 100 sequences, 4 places were taken


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/responses/x/cancel"])
@in_a_loop
async def test_a_request_that_computes_nothing_takes_no_place(path: str) -> None:
    w = World(Places(1))
    await w.ask("a0")
    await w.ask("a1", path=path)
    assert w.new() == ["a0", "a1"]


@in_a_loop
async def test_a_request_whose_client_disconnects_leaves_the_queue() -> None:
    w = World(Places(1))
    await w.ask("a0")
    waiting = await w.ask("b0")
    await w.ask("b1")
    w.disconnects["b0"].set()
    with pytest.raises(ClientDisconnect):
        await waiting
    await w.end("a0")
    assert w.new() == ["a0", "b1"]


@in_a_loop
async def test_a_request_that_is_cancelled_leaves_the_queue_or_gives_its_place_back() -> None:
    w = World(Places(1))
    running, waiting = await w.ask("a0"), await w.ask("b0")
    await w.ask("c0")
    waiting.cancel()
    await quiet()
    running.cancel()
    await quiet()
    assert w.new() == ["a0", "c0"]


@in_a_loop
async def test_a_request_that_is_cancelled_as_it_gets_its_place_gives_it_back() -> None:
    w = World(Places(1))
    await w.ask("a0")
    waiting = await w.ask("b0")
    await w.ask("c0")
    w.ends["a0"].set()
    await asyncio.sleep(0)  # `a0` gives its place to `b0`, which does not run yet
    waiting.cancel()
    assert [turn.names[0] for turn in w.places._counter.turns()] == ["c"]
    await quiet()
    assert w.new() == ["a0", "c0"]


@in_a_loop
async def test_a_request_for_one_more_adapter_than_the_engine_has_slots_for_gets_one_of_the_tenant_with_most() -> None:
    now = 0.0
    w = World(Places(8, slots=3, now=lambda: now))
    for name in ("a/x0", "b/y0", "a/z0", "b/w0"):
        await w.ask(name)
    assert w.new() == ["a/x0", "b/y0", "a/z0"]
    await w.ask("a/z1")
    await w.ask("b/y1")
    await w.ask("a0")  # the base needs no slot
    assert w.new() == ["a/z1", "b/y1", "a0"]
    await w.ask("a/x1")  # waits behind b/w0, for which `x` is closed
    assert w.new() == []
    await w.end("a/x0")
    assert w.new() == ["b/w0"]


@in_a_loop
async def test_a_slot_that_one_long_answer_keeps_is_opened_again_and_another_one_closed() -> None:
    now = [0.0]
    w = World(Places(8, slots=2, now=lambda: now[0]))
    for name in ("a/long0", "a/y0", "b/z0"):
        await w.ask(name)
    await w.ask("a/long1")
    assert w.new() == ["a/long0", "a/y0"]
    now[0] += CLOSED_S
    await w.ask("a/y1")
    assert w.new() == ["a/long1"]
    await w.end("a/y0")
    assert w.new() == ["b/z0"]
