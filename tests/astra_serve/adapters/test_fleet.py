"""Names, and the versions that requests for them reach."""

import pytest

from astra_serve.adapters.version import Alias, Version
from astra_serve.errors import Unavailable, UnknownAdapter
from tests.astra_serve.world import in_a_loop, memory

ONE, TWO = (Version("a", "sha256:" + 64 * digit) for digit in "12")


@in_a_loop
async def test_a_name_points_at_its_current_version_and_a_digest_prefix_at_a_known_one(engine, store, base) -> None:
    async with memory(engine, store, base) as m:
        m.fleet.point("a", Alias(TWO, (ONE,)), 1)
        assert m.fleet.resolve("a") == TWO
        for model in ("a@11111111", "a@111111", ONE.name):
            assert m.fleet.resolve(model) == ONE
        for unknown in ("b", "a@", "a@00000000", "a@11111", "b@11111111", "a@zzzzzzzz", ""):
            assert m.fleet.resolve(unknown) is None


@in_a_loop
async def test_a_prefix_of_two_versions_names_neither(engine, store, base) -> None:
    async with memory(engine, store, base) as m:
        other = Version("a", "sha256:" + 8 * "1" + 56 * "3")
        m.fleet.point("a", Alias(ONE, (other,)), 1)
        assert m.fleet.resolve("a@111111") is None
        assert m.fleet.resolve("a@111111113") == other


@in_a_loop
async def test_a_canary_gets_its_share_and_each_caller_stays_with_one_version(engine, store, base) -> None:
    async with memory(engine, store, base) as m:
        m.fleet.point("a", Alias(ONE, canary=TWO, weight=0.3), 1)
        got = {f"user{i}": m.fleet.resolve("a", f"user{i}") for i in range(2000)}
        assert 0.25 < sum(version == TWO for version in got.values()) / 2000 < 0.35
        assert all(m.fleet.resolve("a", caller) == version for caller, version in got.items())


@in_a_loop
async def test_a_name_that_is_desired_and_not_served_yet_is_unavailable_and_an_unknown_one_is_unknown(
    engine, store, base
) -> None:
    async with memory(engine, store, base) as m:
        m.fleet.expected.add("later")
        for model in ("later", "later@11111111"):
            with pytest.raises(Unavailable, match="is not served yet"):
                await m.answer(model)
        with pytest.raises(UnknownAdapter, match="'none' does not exist"):
            await m.answer("none")
        assert await m.answer(base.name) is None
        assert (m.fleet.known("later@1"), m.fleet.known("none")) == ("later", None)


@in_a_loop
async def test_a_name_that_may_be_in_a_document_that_is_not_read_yet_is_unavailable(engine, store, base) -> None:
    async with memory(engine, store, base) as m:
        m.fleet.complete = False
        with pytest.raises(Unavailable, match="the document has not been read") as error:
            await m.answer("none")
        assert error.value.retry_after_s == 5
        assert await m.answer(base.name) is None


@in_a_loop
async def test_an_unknown_name_gets_the_nearest_one(engine, store, base) -> None:
    async with memory(engine, store, base) as m:
        for name in ("sql", "intent", "team/summary", *(f"task-{number}" for number in range(200))):
            m.fleet.point(name, Alias(Version(name, ONE.digest)), 1)
        for model, nearest in (
            ("sqll", "sql"),
            ("intents", "intent"),
            ("task-1999", "task-199"),
            ("sql@", "sql@111111111111"),
            ("sql@deadbeef", "sql@111111111111"),
            (base.name + "s", base.name),
            ("summary", "team/summary"),
            ("summary@deadbeef", "team/summary"),
            ("team/sumary", "team/summary"),
        ):
            assert f"did you mean {nearest!r}?" in str(m.fleet.unknown(model))
        for model in ("zzzzzz", "x" * 1_000_000, "sql@" + "x" * 1_000_000):
            assert str(m.fleet.unknown(model)).endswith("does not exist: GET /v1/models lists the models")
            assert len(str(m.fleet.unknown(model))) < 300


@in_a_loop
async def test_requests_for_the_bare_name_are_counted_by_version_since_the_alias_changed(
    engine, store, base, write_lora
) -> None:
    async with memory(engine, store, base) as m:
        one, two = (Version("a", store.add(write_lora(str(value), value))) for value in (1.0, 2.0))
        m.fleet.point("a", Alias(one, canary=two, weight=0.5), 1)
        for caller in range(20):
            await m.answer("a", str(caller))
        await m.answer(two.name)
        assert m.fleet.requests["a"].total() == 20
        assert set(m.fleet.requests["a"]) == {one, two}
        m.fleet.point("a", Alias(one), 1)
        assert not m.fleet.requests["a"]
