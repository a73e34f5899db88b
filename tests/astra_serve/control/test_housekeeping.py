"""The server's timer, with a stand-in for the engine."""

import pytest

from astra_serve.errors import Unavailable
from tests.astra_serve.world import in_a_loop, running


@in_a_loop
async def test_a_version_that_was_damaged_while_it_served_is_fetched_again(world, write_lora, store) -> None:
    async with world(capacity=1) as w, running(w.housekeeping):
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        current = w.fleet.aliases["a"].current
        await w.residency.unload(current)
        store.discard(current.digest)
        with pytest.raises(Unavailable):
            await w.answer("a")
        await w.clock.advance(5)
        assert (await w.settled("a")).phase == "serving"
        events = [event for event in w.events.newest if event.event == "failed"]
        assert "is gone from the store" in events[-1].reason
        assert await w.answer("a") == (current.name, 1.0)


@in_a_loop
async def test_the_store_keeps_the_versions_that_are_referred_to_and_a_few_more(world, write_lora, store) -> None:
    async with world() as w:
        digests = []
        for i in range(1, 16):
            answer = await w.api.put("/adapters/a", json={"source": str(write_lora(str(i), float(i)))})
            digests.append(answer.json()["version"]["digest"])
        await w.residency.idle()
        await w.housekeeping.collect()
        there = [digest in store for digest in digests]
        assert all(there[-9:])  # the current one and the eight that a rollback can reach
        assert sum(there) <= 9 + 3


@in_a_loop
async def test_a_version_that_was_prepared_for_later_stays_for_an_hour(world, write_lora, store, monkeypatch) -> None:
    monkeypatch.setattr("astra_serve.control.housekeeping.KEEP", 0)
    async with world() as w:
        digest = (await w.api.put("/prepared/b", json={"source": str(write_lora("two", 2.0))})).json()["digest"]
        await w.residency.idle()
        await w.clock.advance(3599)
        await w.housekeeping.collect()
        assert digest in store
        await w.clock.advance(2)
        await w.housekeeping.collect()
        assert digest not in store


@in_a_loop
async def test_nothing_is_removed_while_a_version_is_prepared(world, write_lora, store, monkeypatch) -> None:
    monkeypatch.setattr("astra_serve.control.housekeeping.KEEP", 0)
    async with world() as w:
        digest = store.add(write_lora("two", 2.0))
        with store.keeping() as kept:
            kept.append(digest)
            await w.housekeeping.collect()
            assert digest in store
        store.collect(set(), newest=0)  # it began before the end: the version may be served by now
        assert digest in store
        await w.housekeeping.collect()
        assert digest not in store
