"""The loop of the engine's memory, with a stand-in for the engine; tests/e2e asks the same of the real one."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from astra_serve.adapters.schedule import Owner, State
from astra_serve.adapters.version import Alias, Version
from astra_serve.errors import ServeError, Unavailable
from tests.astra_serve.stand_in import MODULE
from tests.astra_serve.world import Memory, in_a_loop, memory, quiet


@pytest.fixture
def version(store, write_lora) -> Callable[[str, float], Version]:
    return lambda alias, value: Version(alias, store.add(write_lora(f"{alias}{value}", value)))


def serve(m: Memory, *versions: Version, pinned: bool = False) -> None:
    for one in versions:
        m.fleet.point(one.alias, Alias(one, pinned=pinned), 1)


async def endless(m: Memory, model: str) -> "asyncio.Task[None]":
    """Begin a request that does not end by itself, and return it when it has its lease."""
    started = asyncio.Event()

    async def ask() -> None:
        async with m.fleet.lease(model):
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(ask())
    await started.wait()
    return task


@in_a_loop
async def test_a_request_finishes_on_its_version_which_is_evicted_then(engine, store, base, version) -> None:
    one, two = version("a", 1.0), version("a", 2.0)
    async with memory(engine, store, base) as m:
        serve(m, one)
        async with m.fleet.lease("a") as held, m.residency.hold(two):
            m.fleet.point("a", Alias(two), 10)
            assert await m.answer("a") == (two.name, 2.0)  # the next request
            await quiet()
            assert held.version == one
            assert engine.loaded[held.handle] == 1.0  # still there for the one that leases it
        await m.residency.idle()
        assert list(engine.loaded) == [two.name]


@in_a_loop
async def test_a_version_that_does_not_fit_is_refused_in_the_words_of_its_source(
    engine, store, base, write_lora
) -> None:
    async with memory(engine, store, replace(base, max_rank=8)) as m:
        large = Version("a", store.add(write_lora("large", 1.0, rank=16), source="s3://user:password@bucket/large"))
        with pytest.raises(Unavailable) as caught:
            async with m.residency.hold(large):
                pass
        assert str(caught.value).endswith(": s3://bucket/large has rank 16; the engine serves at most 8")


@in_a_loop
async def test_requests_that_outlive_the_deadline_of_their_version_are_cancelled(engine, store, base, version) -> None:
    one, two = version("a", 1.0), version("a", 2.0)
    async with memory(engine, store, base) as m:
        serve(m, one)
        task = await endless(m, "a")
        m.fleet.point("a", Alias(two, (one,)), 5)
        later = asyncio.create_task(m.answer(one.name))  # by its digest, after it was replaced
        await later
        await m.clock.advance(4.9)
        assert not task.done()
        await m.clock.advance(0.2)
        assert task.cancelled()
        await m.residency.idle()
        assert m.residence(one).state is State.ABSENT


@in_a_loop
async def test_a_second_replacement_does_not_prolong_the_deadline_of_a_request(engine, store, base, version) -> None:
    one, two, three = (version("a", value) for value in (1.0, 2.0, 3.0))
    async with memory(engine, store, base) as m:
        serve(m, one)
        first = await endless(m, "a")
        m.fleet.point("a", Alias(two, (one,)), 5)
        second = await endless(m, "a")
        await m.clock.advance(3)
        m.fleet.point("a", Alias(three, (two,)), 5)  # `one` leaves the rollback history, too
        await m.clock.advance(2.1)
        assert (first.cancelled(), second.done()) == (True, False)
        await m.clock.advance(3)
        assert second.cancelled()


@in_a_loop
async def test_a_request_for_an_earlier_version_has_no_deadline_until_that_version_leaves_the_history(
    engine, store, base, version
) -> None:
    one, two, three = (version("a", value) for value in (1.0, 2.0, 3.0))
    async with memory(engine, store, base) as m:
        m.fleet.point("a", Alias(two, (one,)), 5)
        pinned = await endless(m, one.name)
        m.fleet.point("a", Alias(two, (one,), canary=three, weight=0.5), 5)
        m.fleet.point("a", Alias(three, (two, one)), 5)
        await m.clock.advance(60)
        assert not pinned.done()
        m.fleet.point("a", Alias(three, (two,)), 5)
        await m.clock.advance(4.9)
        assert not pinned.done()
        await m.clock.advance(0.2)
        assert pinned.cancelled()


@in_a_loop
async def test_a_publication_that_only_prepares_a_replaced_version_lets_the_deadlines_of_its_requests_stand(
    engine, store, base, version
) -> None:
    one, two = version("a", 1.0), version("a", 2.0)
    async with memory(engine, store, base) as m:
        serve(m, one)
        old = await endless(m, "a")
        m.fleet.point("a", Alias(two, (one,)), 5)
        async with m.residency.hold(one):
            await m.clock.advance(1)
        await m.clock.advance(4.1)
        assert old.cancelled()


@in_a_loop
async def test_requests_of_a_version_that_serves_again_are_not_cancelled(engine, store, base, version) -> None:
    one, two = version("a", 1.0), version("a", 2.0)
    async with memory(engine, store, base) as m:
        serve(m, one)
        async with m.fleet.lease("a"):
            m.fleet.point("a", Alias(two, (one,)), 5)
            m.fleet.point("a", Alias(one, (two,)), 5)
            await m.clock.advance(60)
        await m.residency.idle()
        assert m.residence(one).state is State.RESIDENT


@in_a_loop
async def test_the_engine_never_has_more_adapters_than_places_and_headroom(engine, store, base, version) -> None:
    """The stand-in fails where an engine would have evicted an adapter by itself."""
    async with memory(engine, store, base) as m:
        serve(m, *(version(name, value) for value, name in zip((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), "abcdef", strict=True)))
        answers = await asyncio.gather(*(m.answer("abcdef"[i * 5 % 6]) for i in range(60)))
        assert all(answers)
        await m.residency.idle()
        assert len(engine.loaded) == 2


@in_a_loop
async def test_the_least_recently_used_version_is_evicted_and_a_pinned_or_leased_one_stays(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base) as m:
        serve(m, version("pinned", 1.0), pinned=True)
        serve(m, version("b", 2.0), version("c", 3.0))
        for name in ("pinned", "b", "c"):
            await m.answer(name)
            await m.clock.advance(1)
        assert m.loaded() == ["pinned", "c"]
        async with m.fleet.lease("c"):
            waiting = asyncio.create_task(m.answer("b"))
            await m.clock.advance(0.5)
            assert not waiting.done()
        assert await waiting is not None
        assert m.loaded() == ["pinned", "b"]


@in_a_loop
async def test_a_version_counts_as_used_until_its_last_request_has_ended(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        serve(m, version("a", 1.0), version("b", 2.0), version("c", 3.0))
        async with m.fleet.lease("a"):
            await m.clock.advance(1)
            await m.answer("b")
            await m.clock.advance(1)
        await m.answer("c")
        assert m.loaded() == ["a", "c"]


@in_a_loop
async def test_a_request_without_a_place_for_wait_s_is_refused_with_the_time_to_try_again(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base, 1, wait_s=30.0) as m:
        serve(m, version("a", 1.0), version("b", 2.0))
        async with m.fleet.lease("a"):
            waiting = asyncio.create_task(m.answer("b"))
            await m.clock.advance(29)
            assert not waiting.done()
            await m.clock.advance(1)
            with pytest.raises(Unavailable, match="waits for the engine's memory") as caught:
                await waiting
            assert caught.value.retry_after_s == 5
        assert await m.answer("b") is not None


@in_a_loop
async def test_a_request_that_waits_for_a_place_has_it_as_soon_as_a_lease_ends(engine, store, base, version) -> None:
    async with memory(engine, store, base, 1) as m:
        serve(m, version("a", 1.0), version("b", 2.0))
        async with m.fleet.lease("a"):
            waiting = asyncio.create_task(m.answer("b"))
            await quiet()
            assert not waiting.done()
        assert await waiting is not None  # the clock stands still


@in_a_loop
async def test_a_request_that_gave_up_takes_no_place_and_a_long_stream_closes_no_adapter(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base, 1, wait_s=30.0, patience_s=1.0, mark_s=10.0) as m:
        serve(m, version("long", 1.0), version("cold", 2.0))
        async with m.fleet.lease("long") as held:
            cold = asyncio.create_task(m.answer("cold"))
            await m.clock.advance(1)
            assert m.residence(held.version).state is State.MARKED
            beside = asyncio.create_task(m.answer("long"))
            await m.clock.advance(9.9)
            assert not beside.done()
            await m.clock.advance(0.2)
            assert beside.done()  # admitted beside the long one
            await m.clock.advance(20)
            with pytest.raises(Unavailable):
                await cold
            assert m.residence(held.version).state is State.RESIDENT
        await m.residency.idle()
        assert m.loaded() == ["long"]


@in_a_loop
async def test_no_adapter_starves_beside_others_that_are_in_use_without_a_pause(engine, store, base, version) -> None:
    async with memory(engine, store, base, patience_s=1.0) as m:
        serve(m, version("hot1", 1.0), version("hot2", 2.0), version("cold", 3.0))
        stop, answered = False, dict.fromkeys(("hot1", "hot2"), 0)

        async def ask_on(name: str) -> None:
            while not stop:
                async with m.fleet.lease(name) as held:
                    assert engine.loaded[held.handle] == {"hot1": 1.0, "hot2": 2.0}[name]
                    await m.clock.sleep(0.2)
                answered[name] += 1

        hot = [asyncio.create_task(ask_on(name)) for name in answered for _ in range(3)]
        await m.clock.advance(0.1)
        cold = asyncio.create_task(m.answer("cold"))
        waited = 0.0
        while not cold.done():
            await m.clock.advance(0.1)
            await asyncio.sleep(0.001)  # threads read files
            waited += 0.1
        assert waited < 5
        before = dict(answered)
        for _ in range(30):
            await m.clock.advance(0.1)
            await asyncio.sleep(0.001)
        assert all(answered[name] > before[name] for name in answered)
        stop = True
        await m.clock.advance(60)
        await asyncio.gather(*hot)


@in_a_loop
async def test_more_publications_than_places_are_all_proved_however_long_that_takes(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base, 1, wait_s=0.2) as m:
        paused = asyncio.Event()

        async def pause() -> None:
            paused.set()
            await m.clock.sleep(0.15)

        engine.pause = pause

        async def publish(one: Version) -> None:
            async with m.residency.hold(one):
                serve(m, one)

        versions = [version(f"a{number}", number + 1.0) for number in range(10)]
        publications = asyncio.gather(*(publish(one) for one in versions))
        while not publications.done():
            pausing = asyncio.ensure_future(paused.wait())
            await asyncio.wait([pausing, publications], return_when=asyncio.FIRST_COMPLETED)
            pausing.cancel()
            paused.clear()
            await m.clock.advance(0.15)
        await publications
        assert len(m.fleet.aliases) == 10


@in_a_loop
async def test_requests_do_not_wait_for_the_loads_of_publications(engine, store, base, version) -> None:
    async with memory(engine, store, base, 8) as m:
        serve(m, version("asked", 9.0))
        engine.gate.clear()
        others = [version(f"a{number}", number + 1.0) for number in range(6)]
        holds = [m.residency.hold(one) for one in others]
        publications = [asyncio.create_task(hold.__aenter__()) for hold in holds]
        await quiet()
        assert sum(m.residence(one).state is State.LOADING for one in others) == 3
        asked = asyncio.create_task(m.answer("asked"))
        await quiet()
        assert m.residence(Version("asked", m.current("asked"))).state is State.LOADING
        engine.gate.set()
        assert await asked is not None
        await asyncio.gather(*publications)
        for hold in holds:
            await hold.__aexit__(None, None, None)


@in_a_loop
async def test_a_version_that_was_changed_on_disk_fails_alone(engine, store, base, version) -> None:
    async with memory(engine, store, base, 1) as m:
        bad, good = version("bad", 1.0), version("good", 2.0)
        serve(m, bad, good)
        assert await m.answer("bad") is not None
        file = store.folder(bad.digest) / "adapter_model.safetensors"
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        assert await m.answer("bad") == (bad.name, 1.0)  # the engine has it in memory
        assert await m.answer("good") is not None  # bad was evicted
        for _ in range(2):
            with pytest.raises(Unavailable, match="was changed in the store: publish it again"):
                await m.answer("bad")
        assert await m.answer("good") is not None


@in_a_loop
async def test_an_adapter_that_the_engine_refuses_fails_alone_until_it_is_published_again(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base) as m:
        bad = version("bad", 1.0)
        serve(m, bad, version("good", 2.0))
        engine.refuse = {"bad"}
        with pytest.raises(Unavailable, match="the engine cannot load it"):
            await m.answer("bad")
        engine.refuse = set()
        with pytest.raises(Unavailable, match="the engine cannot load it"):
            await m.answer("bad")
        assert await m.answer("good") is not None
        async with m.residency.hold(bad):
            pass
        assert await m.answer("bad") is not None


@in_a_loop
async def test_a_version_that_the_engine_does_not_forget_costs_a_place_and_nothing_else(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base, 3) as m:
        engine.capacity = 4  # the stand-in keeps what it does not forget
        one = version("a", 1.0)
        serve(m, one, version("b", 2.0), version("c", 3.0), version("d", 4.0))
        await m.answer("a")
        engine.stuck = {"a"}
        await m.residency.unload(one)
        assert m.residency.limits.capacity == 2
        assert "still holds" in m.residence(one).failed
        for name in "bcdbcd":
            assert await m.answer(name) is not None
        with pytest.raises(Unavailable, match="still holds"):
            await m.answer("a")


@in_a_loop
async def test_a_version_of_an_earlier_process_is_proved_before_its_first_request(engine, store, base, version) -> None:
    """As a version that a rollback can reach: no publication of this process proved it."""
    async with memory(engine, store, base) as m:
        one, two = version("a", 1.0), version("a", 2.0)
        m.fleet.point("a", Alias(one, (two,)), 1)
        assert await m.answer(two.name) is not None
        assert (two.name, 8, True) in engine.asked  # eight prompts, before other requests: a request waits for it
        engine.silent = {"b"}
        serve(m, version("b", 3.0))
        with pytest.raises(Unavailable, match="changes nothing"):
            await m.answer("b")
        assert m.loaded() == ["a"]


@in_a_loop
async def test_a_version_of_which_the_engine_leaves_modules_out_is_refused_and_unloaded(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base) as m:
        engine.partly = {"a"}
        with pytest.raises(Unavailable, match=f"does not adapt 1 of its modules: {MODULE}; see --lora-target-modules"):
            async with m.residency.hold(version("a", 1.0)):
                pass
        assert not engine.loaded


@in_a_loop
async def test_a_version_that_is_published_again_must_answer_as_before(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        one = version("a", 1.0)
        for _ in range(2):
            async with m.residency.hold(one):
                pass
            await m.residency.idle()
        assert [asked for asked in engine.asked if asked[0] == one.name] == [(one.name, 8, False), (one.name, 1, False)]
        engine.silent = {"a"}  # other weights under the same bytes: a fault of the engine
        with pytest.raises(Unavailable, match="nats from its answers with this version before"):
            async with m.residency.hold(one):
                pass
        assert not engine.loaded


@in_a_loop
async def test_a_permission_to_change_nothing_ends_with_the_publication_that_had_it(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base) as m:
        zero = version("a", 0.0)
        async with m.residency.hold(zero, allow_no_effect=True):
            pass
        await m.residency.idle()
        with pytest.raises(Unavailable, match="changes nothing"):
            async with m.residency.hold(zero):
                pass


@in_a_loop
async def test_a_version_that_is_read_again_for_a_request_is_not_probed_again(engine, store, base, version) -> None:
    async with memory(engine, store, base, 1) as m:
        serve(m, version("a", 1.0), version("b", 2.0))
        for name in "abab":
            assert await m.answer(name) is not None
        assert [name for name, *_ in engine.asked if name].count(m.fleet.aliases["a"].current.name) == 1


@in_a_loop
async def test_unloading_waits_for_the_last_lease_and_the_next_request_loads_again(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base) as m:
        one = version("a", 1.0)
        serve(m, one)
        async with m.fleet.lease("a"):
            unloading = asyncio.create_task(m.residency.unload(one))
            await quiet()
            assert engine.loaded
        await unloading
        assert m.residency.where(one) == "disk"
        assert not engine.loaded
        assert await m.answer("a") == (one.name, 1.0)
        await m.residency.idle()
        assert m.residency.where(one) == "memory"
        await m.residency.look()
        assert m.residency.where(one) == "slot"


@in_a_loop
async def test_an_unload_returns_when_the_engine_has_let_the_version_go(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        one = version("a", 1.0)
        serve(m, one)
        await m.answer("a")
        engine.gate.clear()
        unloading = asyncio.create_task(m.residency.unload(one))
        await quiet()
        assert not unloading.done()
        engine.gate.set()
        await unloading
        assert not engine.loaded


@in_a_loop
async def test_the_memory_is_not_idle_while_a_version_loads_or_drains(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        serve(m, version("a", 1.0), version("b", 2.0))
        async with m.fleet.lease("a"):
            engine.gate.clear()
            asked = asyncio.create_task(m.answer("b"))
            await quiet()
            idle = asyncio.create_task(m.residency.idle())
            await quiet()
            assert not idle.done()  # b loads
            engine.gate.set()
            await asked
            await idle
            m.fleet.drop("a", 5)
            idle = asyncio.create_task(m.residency.idle())
            await quiet()
            assert not idle.done()  # a drains
        await idle
        assert m.loaded() == ["b"]


@in_a_loop
async def test_a_pinned_version_that_was_replaced_is_evicted_like_any_other(engine, store, base, version) -> None:
    async with memory(engine, store, base, 1) as m:
        one, two = version("a", 1.0), version("a", 2.0)
        serve(m, one, pinned=True)
        m.fleet.point("a", Alias(two, (one,)), 1)
        for name in (one.name, two.name):  # the first one is in the engine again for a request by its digest
            assert (await m.answer(name))[0] == name
        assert list(engine.loaded) == [two.name]


@in_a_loop
async def test_a_request_during_an_unload_keeps_the_version(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        one = version("a", 1.0)
        serve(m, one)
        async with m.fleet.lease("a"):
            unloading = asyncio.create_task(m.residency.unload(one))
            await quiet()
            assert await m.answer("a") == (one.name, 1.0)
            await unloading
        assert m.loaded() == ["a"]
        assert engine.loads == [one.name]


@in_a_loop
async def test_a_publication_that_is_cancelled_leaves_nothing_in_the_engine(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        engine.gate.clear()
        one = version("a", 1.0)
        holding = asyncio.create_task(m.residency.hold(one).__aenter__())
        await quiet()
        holding.cancel()
        await quiet()
        engine.gate.set()
        await m.residency.idle()
        assert not engine.loaded
        assert m.residence(one).holds == 0


@in_a_loop
async def test_a_request_that_is_cancelled_as_it_is_granted_holds_no_lease(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        one = version("a", 1.0)
        serve(m, one)
        asked = asyncio.create_task(m.fleet.lease("a").__aenter__())
        while m.residence(one).state is not State.RESIDENT:
            await asyncio.sleep(0)
        asked.cancel()
        await quiet()
        assert not m.residence(one).leases
        assert not m.residence(one).waiters


@in_a_loop
async def test_a_publication_that_was_cancelled_as_it_was_granted_or_has_failed_keeps_no_memory(
    engine, store, base, version
) -> None:
    async with memory(engine, store, base) as m:
        one = version("a", 1.0)
        holding = asyncio.create_task(m.residency.hold(one).__aenter__())
        while m.residence(one).state is not State.RESIDENT:
            await asyncio.sleep(0)
        holding.cancel()
        await m.residency.idle()
        engine.refuse = {"a"}
        with pytest.raises(Unavailable, match="the engine cannot load it"):
            async with m.residency.hold(one):
                pass
        engine.refuse = set()
        async with m.residency.hold(one):
            pass
        await m.residency.idle()
        assert not engine.loaded


@in_a_loop
async def test_a_load_goes_on_when_its_request_gives_up_and_serves_the_next_one(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        one = version("a", 1.0)
        serve(m, one)
        engine.gate.clear()
        first = asyncio.create_task(m.answer("a"))
        while m.residence(one).state is not State.LOADING:
            await asyncio.sleep(0)
        first.cancel()
        await quiet()
        second = asyncio.create_task(m.answer("a"))
        await quiet()
        engine.gate.set()
        assert await second == (one.name, 1.0)
        assert [event.event for event in m.events.newest].count("loading") == 1


@in_a_loop
async def test_a_request_that_is_cancelled_as_its_load_fails_ends_alone(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        serve(m, version("a", 1.0), version("b", 2.0))

        async def fail() -> None:
            engine.pause = engine.gate.wait
            asked.cancel()
            raise ServeError("the engine cannot load it")

        engine.pause = fail
        asked = asyncio.create_task(m.answer("a"))
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await m.answer("b") is not None


@in_a_loop
async def test_many_swaps_under_load_leave_nothing_behind_and_mix_nothing(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        versions = [version("a", value) for value in (1.0, 2.0)]
        serve(m, versions[0])
        wrong, asked, stop = [], 0, False

        async def client(number: int) -> None:
            nonlocal asked
            while not stop:
                async with m.fleet.lease("a", str(number)) as held:
                    before = engine.loaded[held.handle]
                    await asyncio.sleep(0.001 * (number % 3))
                    if engine.loaded.get(held.handle) != before:
                        wrong.append(held.version.name)
                asked += 1

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        for number in range(100):
            new = versions[(number + 1) % 2]  # perhaps while it is still evicted
            async with m.residency.hold(new):
                await asyncio.sleep(0.001 * (number % 4))
                m.fleet.point("a", Alias(new), 5)
        stop = True
        await asyncio.gather(*clients)
        await m.residency.idle()
        assert not wrong
        assert asked > 100
        assert len(engine.loaded) == 1


@in_a_loop
async def test_proofs_of_versions_that_nothing_names_are_forgotten(engine, store, base, version) -> None:
    async with memory(engine, store, base) as m:
        one, two = version("a", 1.0), version("a", 2.0)
        for held in (one, two):
            async with m.residency.hold(held):
                pass
        await m.residency.idle()
        m.residency.forget({one})
        assert m.residence(one).proof is not None
        assert m.residence(two).proof is None


@in_a_loop
async def test_a_tenant_with_thirty_adapters_does_not_keep_another_one_waiting(engine, store, base, version) -> None:
    """Of A each of 60 clients asks for the next of 30 adapters as soon as it has its answer, after 2 s."""
    async with memory(engine, store, base, capacity=4) as m:
        names = [f"a{number}" for number in range(30)]
        serve(m, *(version(name, float(number)) for number, name in enumerate(names)), version("b", 99.0))
        served, waits, stop = 0, list[float](), asyncio.Event()

        async def flood(turn: int) -> None:
            nonlocal served
            while not stop.is_set():
                try:
                    async with m.fleet.lease(names[turn % 30], owner=Owner("A")):
                        await m.clock.sleep(2)
                        served += 1
                except Unavailable:
                    pass
                turn += 1

        async def now_and_then() -> None:
            while not stop.is_set():
                began = m.clock.now()
                async with m.fleet.lease("b", owner=Owner("B")):
                    waits.append(m.clock.now() - began)
                await m.clock.sleep(5)

        running = [asyncio.create_task(flood(number)) for number in range(60)]
        running.append(asyncio.create_task(now_and_then()))
        for _ in range(480):
            await m.clock.advance(0.25)
        stop.set()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert len(waits) > 15
        assert max(waits) <= 4
        assert served > 200
