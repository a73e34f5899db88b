"""Names, versions and leases, with a stand-in for the engine; tests/e2e asks the same of the real one."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from astra_serve.adapters import residency as places
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store
from astra_serve.adapters.version import Alias, Version
from astra_serve.errors import Unavailable
from tests.astra_serve.conftest import StandInEngine


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


@pytest.fixture
def version(store: Store, write_lora) -> Callable[..., Version]:
    def make(alias: str, value: float, **settings: Any) -> Version:
        return Version(alias, store.add(write_lora(f"{alias}{value}", value)), **settings)

    return make


async def answer(fleet: Fleet, engine: StandInEngine, model: str, caller: str = "") -> tuple[str, float] | None:
    async with fleet.lease(model, caller) as held:
        return None if held is None else (held.name, engine.loaded[held.handle])


@in_a_loop
async def test_a_name_means_its_current_version_and_a_digest_pins_one(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    one, two = version("a", 1.0), version("a", 2.0)
    fleet.point("a", Alias(two, [one]), 1)
    assert await answer(fleet, engine, "a") == (two.name, 2.0)
    prefix = one.digest.removeprefix("sha256:")[:8]
    assert await answer(fleet, engine, f"a@{prefix}") == (one.name, 1.0)
    assert await answer(fleet, engine, one.name) == (one.name, 1.0)
    for unknown in ("b", "a@", "a@00000", f"a@{prefix[:5]}", f"b@{prefix}", "a@zzzzzzzz", ""):
        assert await answer(fleet, engine, unknown) is None


@in_a_loop
async def test_a_request_finishes_on_the_version_it_started_on_and_then_it_leaves(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    one, two = version("a", 1.0), version("a", 2.0)
    fleet.point("a", Alias(one), 1)
    async with fleet.lease("a") as held:
        await fleet.places.make_resident(two)
        fleet.point("a", Alias(two), 10)
        assert await answer(fleet, engine, "a") == (two.name, 2.0)  # the next request
        await asyncio.sleep(0.05)
        assert held is one
        assert engine.loaded[one.handle] == 1.0  # still there for the one that holds it
    await fleet.drained()
    assert list(engine.loaded) == [two.name]


@in_a_loop
async def test_who_does_not_finish_before_the_deadline_is_cancelled(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    one, two = version("a", 1.0), version("a", 2.0)
    fleet.point("a", Alias(one), 1)
    ended = asyncio.Event()

    async def endless() -> None:
        try:
            async with fleet.lease("a"):
                await asyncio.sleep(60)
        finally:
            ended.set()

    task = asyncio.create_task(endless())
    await asyncio.sleep(0.05)
    fleet.point("a", Alias(two), 0.1)
    await fleet.drained()
    assert ended.is_set()
    assert task.cancelled()
    assert one.handle is None


@in_a_loop
async def test_the_engine_never_holds_more_than_it_has_room_for(engine, store, base, version) -> None:
    """The stand-in fails where an engine would have pushed an adapter out."""
    fleet = Fleet(engine, store, base, 2)
    engine.delay = 0.002
    for i in range(6):
        fleet.point(str(i), Alias(version(str(i), float(i + 1))), 1)

    async def ask(i: int) -> None:
        assert await answer(fleet, engine, str(i)) is not None

    await asyncio.gather(*(ask(i * 5 % 6) for i in range(60)))
    assert len(engine.loaded) == 2


@in_a_loop
async def test_the_least_recently_used_goes_and_a_pinned_one_or_one_in_use_stays(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    pinned, b, c = version("pinned", 1.0, pinned=True), version("b", 2.0), version("c", 3.0)
    for v in (pinned, b, c):
        fleet.point(v.alias, Alias(v), 1)
        await answer(fleet, engine, v.alias)
    assert set(engine.loaded) == {pinned.name, c.name}
    async with fleet.lease("c"):
        waiting = asyncio.create_task(answer(fleet, engine, "b"))
        await asyncio.sleep(0.05)
        assert not waiting.done()  # nobody can go
    assert await waiting == (b.name, 2.0)
    assert set(engine.loaded) == {pinned.name, b.name}


@in_a_loop
async def test_who_waits_too_long_for_room_is_told_to_try_again(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 1, wait_s=0.05)
    for name, value in (("a", 1.0), ("b", 2.0)):
        fleet.point(name, Alias(version(name, value)), 1)
    async with fleet.lease("a"):
        with pytest.raises(Unavailable, match="waiting for room in the engine") as caught:
            await answer(fleet, engine, "b")
        assert caught.value.retry_after_s == 5
    await asyncio.sleep(0.05)
    assert await answer(fleet, engine, "b") is not None  # its turn came


@in_a_loop
async def test_a_version_that_was_changed_on_disk_fails_alone(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 1)
    bad, good = version("bad", 1.0), version("good", 2.0)
    for v in (bad, good):
        fleet.point(v.alias, Alias(v), 1)
    assert await answer(fleet, engine, "bad") is not None
    file = store.folder(bad.digest) / "adapter_model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert await answer(fleet, engine, "bad") == (bad.name, 1.0)  # the engine has it in memory
    assert await answer(fleet, engine, "good") is not None  # bad had to go
    for _ in range(2):
        with pytest.raises(Unavailable, match="was changed in the store: publish it again"):
            await answer(fleet, engine, "bad")
    assert await answer(fleet, engine, "good") is not None


@in_a_loop
async def test_an_adapter_that_the_engine_refuses_fails_alone(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    engine.refuse = {"bad"}
    for name, value in (("bad", 1.0), ("good", 2.0)):
        fleet.point(name, Alias(version(name, value)), 1)
    with pytest.raises(Unavailable, match="the engine cannot load it"):
        await answer(fleet, engine, "bad")
    assert await answer(fleet, engine, "good") is not None


@in_a_loop
async def test_a_canary_gets_its_share_and_each_caller_stays_with_one_version(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    one, two = version("a", 1.0), version("a", 2.0)
    fleet.point("a", Alias(one, canary=two, weight=0.3), 1)
    got = {f"user{i}": fleet.resolve("a", f"user{i}") for i in range(2000)}
    assert 0.25 < sum(v is two for v in got.values()) / 2000 < 0.35
    assert all(fleet.resolve("a", caller) is v for caller, v in got.items())


@in_a_loop
async def test_many_swaps_under_load_leave_nothing_behind_and_mix_nothing(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    engine.delay = 0.0005
    digests = [version("a", value).digest for value in (1.0, 2.0)]
    fleet.point("a", Alias(fleet.version("a", digests[0])), 5)
    wrong, asked = [], 0
    stop = False

    async def client(n: int) -> None:
        nonlocal asked
        while not stop:
            async with fleet.lease("a", str(n)) as held:
                assert held is not None
                before = engine.loaded[held.handle]
                await asyncio.sleep(0.001 * (n % 3))
                if engine.loaded.get(held.handle) != before:
                    wrong.append(held.name)
            asked += 1

    clients = [asyncio.create_task(client(n)) for n in range(8)]
    for number in range(100):
        new = fleet.version("a", digests[(number + 1) % 2])  # while it may still be leaving
        async with fleet.coming(new):
            await asyncio.sleep(0.001 * (number % 4))
            fleet.point("a", Alias(new), 5)
    stop = True
    await asyncio.gather(*clients)
    await fleet.drained()
    assert not wrong
    assert asked > 100
    assert len(engine.loaded) == 1


@in_a_loop
async def test_nobody_starves_where_others_are_asked_for_without_a_pause(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2, patience_s=0.1)
    for name, value in (("hot1", 1.0), ("hot2", 2.0), ("cold", 3.0)):
        fleet.point(name, Alias(version(name, value)), 1)
    stop = False

    async def ask_on(name: str) -> None:
        while not stop:
            async with fleet.lease(name) as held:
                assert held is not None
                assert engine.loaded[held.handle] == {"hot1": 1.0, "hot2": 2.0}[name]
                await asyncio.sleep(0.02)

    hot = [asyncio.create_task(ask_on(name)) for name in ("hot1", "hot2") for _ in range(3)]
    await asyncio.sleep(0.05)
    before = asyncio.get_running_loop().time()
    assert (await answer(fleet, engine, "cold")) is not None
    assert asyncio.get_running_loop().time() - before < 2  # of 30 that a request would wait
    await asyncio.sleep(0.3)  # and the hot ones are served again
    stop = True
    await asyncio.gather(*hot)


@in_a_loop
async def test_a_version_of_an_earlier_process_is_proved_before_its_first_request(engine, store, base, version) -> None:
    """As one that a rollback may go to: no publication brings it into this process."""
    fleet = Fleet(engine, store, base, 2)
    one, two = version("a", 1.0), version("a", 2.0)
    fleet.point("a", Alias(one, [two]), 1)
    assert await answer(fleet, engine, two.name) is not None
    assert (two.name, 8, True) in engine.asked  # eight prompts, before other people's requests: one waits for it
    engine.silent = {"b"}
    fleet.point("b", Alias(version("b", 3.0)), 1)
    with pytest.raises(Unavailable, match="changes nothing"):
        await answer(fleet, engine, "b")
    assert "b" not in {name.partition("@")[0] for name in engine.loaded}


@in_a_loop
async def test_a_version_that_is_published_again_must_say_what_it_said_before(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    one = version("a", 1.0)
    for _ in range(2):
        async with fleet.coming(one):
            pass
        await fleet.drained()
    assert [asked for asked in engine.asked if asked[0] == one.name] == [(one.name, 8, False), (one.name, 1, False)]
    engine.silent = {"a"}  # other weights under the same bytes: a fault of the engine
    with pytest.raises(Unavailable, match="nats from what it said with this version before"):
        async with fleet.coming(one):
            pass
    assert not engine.loaded


@in_a_loop
async def test_unloading_makes_room_and_the_next_request_loads_again(engine, store, base, version) -> None:
    fleet = Fleet(engine, store, base, 2)
    one = version("a", 1.0)
    fleet.point("a", Alias(one), 1)
    async with fleet.lease("a"):
        unloading = asyncio.create_task(fleet.places.unload(one))
        await asyncio.sleep(0.02)
        assert engine.loaded  # somebody holds it
    await unloading
    assert fleet.places.residency(one) == "disk"
    assert not engine.loaded
    assert await answer(fleet, engine, "a") == (one.name, 1.0)
    await fleet.places.look()
    assert fleet.places.residency(one) == "slot"


@in_a_loop
async def test_who_gave_up_waiting_takes_nobodys_place_and_a_long_stream_closes_no_adapter(
    engine, store, base, version, monkeypatch
) -> None:
    monkeypatch.setattr(places, "LEAVE_S", 0.2)
    fleet = Fleet(engine, store, base, 1, wait_s=0.3, patience_s=0.05)
    for name, value in (("long", 1.0), ("cold", 2.0)):
        fleet.point(name, Alias(version(name, value)), 1)
    async with fleet.lease("long"):
        with pytest.raises(Unavailable):
            await answer(fleet, engine, "cold")
        await asyncio.sleep(0.15)
        assert await answer(fleet, engine, "long") is not None  # it is let in beside the long one
    await asyncio.sleep(0.1)
    assert [name.partition("@")[0] for name in engine.loaded] == ["long"]  # nobody waits for the other any more


@in_a_loop
async def test_more_publications_than_fit_at_once_all_come_through(engine, store, base, version) -> None:
    """However long that takes in all: each waits for its turn."""
    fleet = Fleet(engine, store, base, 1, wait_s=0.2)
    engine.delay = 0.05

    async def publish(number: int) -> None:
        one = version(f"a{number}", number + 1.0)
        async with fleet.coming(one):
            fleet.point(one.alias, Alias(one), 1)

    await asyncio.gather(*(publish(number) for number in range(10)))
    assert len(fleet.aliases) == 10
