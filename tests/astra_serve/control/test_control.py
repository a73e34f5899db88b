"""Changes of adapters: prepare, write, follow; over the admin API, with a stand-in for the engine."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from astra_serve.adapters import store as store_module
from astra_serve.adapters.store import Store
from astra_serve.adapters.version_files import version_digest
from astra_serve.control import preparation
from astra_serve.control.changes import Changes
from astra_serve.document import desired, document_text
from astra_serve.errors import Superseded
from tests.astra_serve.world import World, in_a_loop, quiet, server

README = """\
# adapters.yaml
adapters:
  - name: sql                  # the `model` of requests
    source: {source}           # a folder
    required: true             # /readyz says no until it is served
"""


def digests(answer: Any) -> list[str]:
    return [version["digest"] for version in answer.json()["previous"]]


@in_a_loop
async def test_publish_and_rollback_work_from_the_document_of_the_readme(world, write_lora) -> None:
    """Its entry has a source and no digest: the version that served is first in the rollback history all the same."""
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        await w.follow(README.format(source=one))
        await w.settled("sql")
        second = await w.api.put("/adapters/sql", json={"source": str(two)})
        assert second.status_code == 200
        assert digests(second) == [version_digest(one)]
        back = await w.api.post("/adapters/sql/rollback")
        assert back.status_code == 200
        assert back.json()["version"]["digest"] == version_digest(one)
        assert w.entry("sql").source == str(one)
        again = await w.api.post("/adapters/sql/rollback")
        assert again.json()["version"]["digest"] == version_digest(two)
        assert w.file.read_text().startswith(README.partition("source")[0])


@in_a_loop
async def test_publishing_rolling_back_and_removing(world, write_lora) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        first = (await w.api.put("/adapters/a", json={"source": str(one)})).json()
        assert first["state"] == "serving"
        second = await w.api.put("/adapters/a", json={"source": str(two), "pin": True})
        assert digests(second) == [first["version"]["digest"]]
        assert (w.entry("a").digest, w.entry("a").pin) == (version_digest(two), True)
        back = await w.api.post("/adapters/a/rollback")
        assert back.json()["version"]["digest"] == first["version"]["digest"]
        assert digests(back) == [version_digest(two)]
        assert (await w.api.post("/adapters/a/rollback", json={"digest": "sha256:" + 64 * "0"})).status_code == 409
        assert (await w.api.delete("/adapters/a")).json()["state"] == "removed"
        assert (await w.api.get("/adapters/a")).status_code == 404
        assert desired.parse(w.file.read_text(), "x").adapters == []


@in_a_loop
async def test_a_rollback_that_is_not_possible_names_the_versions_that_are(world, write_lora) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        for source, possible in ((one, "none"), (two, version_digest(one))):
            await w.api.put("/adapters/a", json={"source": str(source)})
            answer = await w.api.post("/adapters/a/rollback", json={"digest": "sha256:" + 64 * "0"})
            assert answer.status_code == 409
            assert answer.json()["error"]["message"].endswith(f"there are: {possible}")


@in_a_loop
async def test_the_seconds_of_a_publication_are_those_of_all_its_parts(world, write_lora) -> None:
    async with world() as w:
        w.engine.pause = lambda: w.clock.sleep(3)
        asked = asyncio.create_task(w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))}))
        while not w.clock.waited_for():
            await asyncio.sleep(0.001)
        await w.clock.advance(3)
        seconds = (await asked).json()["seconds"]
        assert {"fetching", "verifying", "loading", "probing"} <= set(seconds)
        assert (seconds["loading"], sum(seconds.values())) == (3.0, 3.0)
        (event,) = (event for event in w.events.newest if event.event == "serving")
        assert event.seconds == seconds


@in_a_loop
async def test_a_step_back_has_digest_source_and_time(world, write_lora) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        for source in (one, two):
            await w.api.put("/adapters/a", json={"source": str(source)})
        (step,) = w.entry("a").steps
        assert (step.digest, step.source) == (version_digest(one), str(one))
        assert step.replaced.microsecond == 0


@in_a_loop
async def test_a_step_back_has_the_source_of_its_entry_or_else_the_one_that_the_store_knows(
    world, store, write_lora
) -> None:
    async with world() as w:
        first, copy, two = (write_lora(name, value) for name, value in (("one", 1.0), ("copy", 1.0), ("two", 2.0)))
        digest = store.add(first, source=str(first))
        for source, expected in ((copy, copy), (digest, first)):
            await w.follow(f"adapters:\n- name: a\n  source: {source}\n  digest: {digest}\n")
            await w.settled("a")
            await w.api.put("/adapters/a", json={"source": str(two)})
            assert w.entry("a").steps[0].source == str(expected)


@in_a_loop
async def test_a_server_with_an_empty_store_starts_from_a_rolled_back_entry_and_rolls_back_itself(
    world, engine, base, write_lora, tmp_path
) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        for source in (one, two):
            await w.api.put("/adapters/a", json={"source": str(source)})
        await w.api.post("/adapters/a/rollback")
    other = Store(tmp_path / "other")
    engine.loaded.clear()
    async with server(engine, other, base, tmp_path / "adapters.yaml") as w:
        await w.control.refresh()
        assert (await w.settled("a")).phase == "serving"
        assert w.current("a") == version_digest(one)
        back = await w.api.post("/adapters/a/rollback")
        assert back.json()["version"]["digest"] == version_digest(two)
    other.close()


@in_a_loop
async def test_a_step_back_whose_source_has_other_bytes_now_is_refused_with_both_digests(
    world, engine, base, write_lora, tmp_path
) -> None:
    async with world() as w:
        place = write_lora("place", 1.0)
        await w.api.put("/adapters/a", json={"source": str(place)})
        first = w.current("a")
        place.rename(tmp_path / "aside")
        second = version_digest(write_lora("place", 2.0))
        await w.api.put("/adapters/a", json={"source": str(place)})
        assert w.current("a") == second
    other = Store(tmp_path / "other")
    engine.loaded.clear()
    async with server(engine, other, base, tmp_path / "adapters.yaml") as w:
        await w.control.refresh()
        await w.settled("a")
        answer = await w.api.post("/adapters/a/rollback")
        assert answer.status_code == 422
        assert f"its digest is {second}, not {first}" in answer.json()["error"]["message"]
        assert w.current("a") == second
    other.close()


@in_a_loop
async def test_publishing_a_digest_writes_the_source_that_history_or_store_knows(world, write_lora) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        for source in (one, two):
            await w.api.put("/adapters/a", json={"source": str(source)})
        await w.api.put("/adapters/a", json={"source": version_digest(one)})
        assert (w.entry("a").source, w.entry("a").digest) == (str(one), version_digest(one))
        await w.api.put("/adapters/b", json={"source": version_digest(two)})  # no history: the store knows
        assert (w.entry("b").source, w.entry("b").digest) == (str(two), version_digest(two))


@in_a_loop
async def test_a_document_of_an_older_server_is_rolled_back_from_the_store(world, store, write_lora) -> None:
    async with world() as w:
        one, two = (store.add(write_lora(name, value)) for name, value in (("one", 1.0), ("two", 2.0)))
        await w.follow(f"adapters:\n- name: a\n  source: {two}\n  digest: {two}\n  previous: [{one}]\n")
        assert (await w.settled("a")).phase == "serving"
        assert (await w.api.post("/adapters/a/rollback")).status_code == 200
        assert (w.entry("a").source, w.entry("a").previous[0].digest) == (one, two)


@in_a_loop
async def test_a_failed_publication_changes_nothing(world, write_lora) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        before, current = w.file.read_text(), w.current("a")
        zero = str(write_lora("zero", 0.0))
        for source, reason in (("/not/there", "there is no folder /not/there"), (zero, "the adapter changes nothing")):
            answer = await w.api.put("/adapters/a", json={"source": source})
            assert answer.status_code == 422
            assert answer.json()["error"]["message"].startswith(f"'a' was not published: {reason}")
        assert (await w.api.put("/adapters/new", json={"source": "/not/there"})).status_code == 422
        assert w.file.read_text() == before
        assert w.current("a") == current
        assert w.fleet.resolve("new") is None
        assert (await w.api.get("/adapters/a")).json()["state"] == "serving"
        assert (await w.api.get("/adapters/new")).status_code == 404


@in_a_loop
async def test_a_write_that_fails_never_reaches_traffic(world, write_lora, monkeypatch) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        before, current = w.file.read_text(), w.current("a")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(document_text, "_write", full)
        pointed = []
        monkeypatch.setattr(w.fleet, "point", lambda *arguments: pointed.append(arguments))
        answer = await w.api.put("/adapters/a", json={"source": str(write_lora("two", 2.0))})
        assert answer.status_code == 409
        assert "the document cannot be changed: No space left on device" in answer.json()["error"]["message"]
        assert not pointed
        assert (w.file.read_text(), w.current("a")) == (before, current)
        await w.residency.idle()
        assert len(w.engine.loaded) == 1


@in_a_loop
async def test_an_entry_that_cannot_be_served_after_it_was_written_is_put_back(world, write_lora, monkeypatch) -> None:
    async with world() as w:
        one = write_lora("one", 1.0)
        await w.follow(README.format(source=one))
        await w.settled("sql")
        hold = w.preparation.hold

        def failing(entry: Any, status: Any, *, again: bool = True) -> Any:
            if not again and entry.source != str(one):
                raise OSError("Stale file handle")
            return hold(entry, status, again=again)

        monkeypatch.setattr(w.preparation, "hold", failing)
        answer = await w.api.put("/adapters/sql", json={"source": str(write_lora("two", 2.0))})
        assert answer.status_code == 422
        assert "Stale file handle" in answer.json()["error"]["message"]
        assert (w.entry("sql").source, w.entry("sql").digest) == (str(one), version_digest(one))
        assert (await w.settled("sql")).phase == "serving"
        assert w.current("sql") == version_digest(one)


@in_a_loop
async def test_an_entry_that_is_put_back_has_its_own_digest_whatever_serves(world, write_lora, monkeypatch) -> None:
    async with world() as w:
        await w.follow(README.format(source=write_lora("one", 1.0)))
        await w.settled("sql")
        digest, hold = "sha256:" + 64 * "0", w.preparation.hold
        await w.follow(f"adapters:\n- name: sql\n  source: /not/there\n  digest: {digest}\n")
        await w.settled("sql")

        def failing(entry: Any, status: Any, *, again: bool = True) -> Any:
            if not again:
                raise OSError("Stale file handle")
            return hold(entry, status, again=again)

        monkeypatch.setattr(w.preparation, "hold", failing)
        answer = await w.api.put("/adapters/sql", json={"source": str(write_lora("two", 2.0))})
        assert answer.status_code == 422
        assert (w.entry("sql").source, w.entry("sql").digest) == ("/not/there", digest)


@in_a_loop
async def test_a_change_edits_the_lines_of_its_entry_alone(world, write_lora) -> None:
    async with world(capacity=3) as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        text = f"# ours\nadapters:\n- {{name: a, source: {one}}}  # flow\n\n# b\n-   name: b\n    source: '{two}' # q\n"
        await w.follow(text)
        await w.settled("b")
        assert (await w.api.post("/adapters/b/pin")).status_code == 200
        assert w.file.read_text() == text + f"    digest: {version_digest(two)}\n    pin: true\n"


@in_a_loop
async def test_changes_by_others_meanwhile_are_kept_and_followed(world, write_lora) -> None:
    async with world(capacity=3) as w:
        sources = {name: str(write_lora(name, value)) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
        await w.api.put("/adapters/a", json={"source": sources["a"]})
        document_text.edit(str(w.file), lambda text: f"{text}  - {{name: b, source: {sources['b']}}}\n")
        assert (await w.api.put("/adapters/c", json={"source": sources["c"]})).is_success
        assert {entry.name for entry in desired.parse(w.file.read_text(), "x").adapters} == {"a", "b", "c"}
        assert (await w.settled("b")).phase == "serving"
        w.file.write_text("adapters: [{name: half}")
        answer = await w.api.put("/adapters/a", json={"source": sources["b"]})
        assert answer.status_code == 400
        assert "is not YAML" in answer.json()["error"]["message"]
        assert w.current("a") == version_digest(Path(sources["a"]))
        assert w.file.read_text() == "adapters: [{name: half}"


@in_a_loop
async def test_an_entry_that_others_change_during_a_publication_stays_as_they_wrote_it(world, write_lora) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        theirs = f"adapters:\n- name: a\n  source: {write_lora('theirs', 2.0)}\n"

        async def raced() -> None:
            w.engine.pause = w.engine.gate.wait
            document_text.edit(str(w.file), lambda _: theirs)

        w.engine.pause = raced
        answer = await w.api.put("/adapters/a", json={"source": str(write_lora("ours", 3.0))})
        assert answer.status_code == 409
        assert "somebody else has changed 'a'" in answer.json()["error"]["message"]
        assert w.file.read_text() == theirs
        await w.control.refresh()
        assert (await w.settled("a")).phase == "serving"


@pytest.mark.parametrize("theirs", ["adapters:\n- name: a\n  source: {source}\n", "adapters: []\n"])
@in_a_loop
async def test_a_publication_whose_entry_others_change_before_it_is_served_is_no_success(
    world, write_lora, monkeypatch, theirs: str
) -> None:
    async with world(capacity=3) as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        text, hold = theirs.format(source=write_lora("theirs", 2.0)), w.preparation.hold

        @asynccontextmanager
        async def raced(entry: Any, status: Any, *, again: bool = True) -> AsyncIterator[Any]:
            if not again and "ours" in entry.source:  # the server serves the entry that the publication has written
                await w.follow(text)
            async with hold(entry, status, again=again) as prepared:
                yield prepared

        monkeypatch.setattr(w.preparation, "hold", raced)
        answer = await w.api.put("/adapters/a", json={"source": str(write_lora("ours", 3.0))})
        assert answer.status_code == 409
        assert "somebody else has changed 'a' in the document after this publish" in answer.json()["error"]["message"]
        assert w.file.read_text() == text
        expected = version_digest(Path(w.entry("a").source)) if w.entry("a") else None
        assert w.current("a") == expected


@pytest.fixture
def hanging(monkeypatch) -> list[str]:
    """Sources that begin with `hang` are fetched for ever; the list has those whose fetch has ended."""
    ended, fetch = [], preparation.fetch

    async def fetched(source: str, *arguments: Any) -> Path:
        if source.startswith("hang"):
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(source)
        return await fetch(source, *arguments)

    monkeypatch.setattr(preparation, "fetch", fetched)
    return ended


async def publishing(w: World, name: str, source: str) -> "asyncio.Task[Any]":
    """Publish, and return when the source is fetched."""
    asked = asyncio.create_task(w.api.put(f"/adapters/{name}", json={"source": source}))
    while not (found := w.control.changes.preparing().get(name)) or found.phase != "fetching":
        await w.events.change()
    return asked


@pytest.mark.parametrize(
    ("kind", "ask"),
    [
        ("publish", lambda w, source: w.api.put("/adapters/a", json={"source": source})),
        ("rollback", lambda w, _: w.api.post("/adapters/a/rollback")),
        ("remove", lambda w, _: w.api.delete("/adapters/a")),
    ],
)
@in_a_loop
async def test_a_newer_change_supersedes_a_publication_that_hangs(
    world, write_lora, hanging, kind: str, ask: Callable[..., Any]
) -> None:
    async with world() as w:
        one, two = (str(write_lora(name, value)) for name, value in (("one", 1.0), ("two", 2.0)))
        for source in (one, two):
            await w.api.put("/adapters/a", json={"source": source})
        older = await publishing(w, "a", "hang")
        assert (await w.api.get("/adapters/a")).json()["publishing"] == {"source": "hang", "state": "fetching"}
        assert (await ask(w, one)).status_code == 200
        assert hanging == ["hang"]
        answer = await older
        assert answer.status_code == 409
        assert f"this publish of 'a' was superseded by a newer {kind}" in answer.json()["error"]["message"]
        assert w.current("a") == (None if kind == "remove" else version_digest(Path(one)))


@pytest.mark.usefixtures("hanging")
@in_a_loop
async def test_a_pin_waits_for_the_publication_before_it_and_applies_to_its_result(world, write_lora) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        older = await publishing(w, "a", "hang")
        pin = asyncio.create_task(w.api.post("/adapters/a/pin"))
        await quiet()
        assert not pin.done()
        newer = await w.api.put("/adapters/a", json={"source": str(write_lora("two", 2.0))})
        assert (newer.status_code, (await pin).status_code, (await older).status_code) == (200, 200, 409)
        assert w.entry("a").pin
        assert w.entry("a").digest == version_digest(Path(w.entry("a").source))


@pytest.mark.usefixtures("hanging")
@in_a_loop
async def test_a_publication_that_waits_is_superseded_and_other_adapters_do_not_wait(world, write_lora) -> None:
    async with world() as w:
        older = await publishing(w, "a", "hang1")
        other = await w.api.put("/adapters/b", json={"source": str(write_lora("b", 3.0))})
        waiting = asyncio.create_task(w.api.put("/adapters/a", json={"source": "hang2"}))
        await quiet()
        newest = await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        assert [answer.status_code for answer in (await older, await waiting, newest, other)] == [409, 409, 200, 200]


@in_a_loop
async def test_a_publication_that_has_written_is_waited_for_by_a_newer_one(world, write_lora, monkeypatch) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        written, go_on, outcome = asyncio.Event(), asyncio.Event(), w.reconciler.outcome

        async def waits(name: str) -> Any:
            written.set()
            await go_on.wait()
            return await outcome(name)

        monkeypatch.setattr(w.reconciler, "outcome", waits)
        older = asyncio.create_task(w.api.put("/adapters/a", json={"source": str(one)}))
        await written.wait()
        newer = asyncio.create_task(w.api.put("/adapters/a", json={"source": str(two)}))
        await quiet()
        assert not older.done()
        assert not newer.done()
        go_on.set()
        assert ((await older).status_code, (await newer).status_code) == (200, 200)
        assert digests(await newer) == [version_digest(one)]


@pytest.mark.parametrize("superseded", [False, True])
@in_a_loop
async def test_a_change_whose_task_is_cancelled_by_others_ends_as_cancelled(superseded: bool) -> None:
    changes = Changes()

    async def change() -> None:
        async with changes.turn("a", "publish"):
            await asyncio.Event().wait()

    older = asyncio.create_task(change())
    await quiet()
    newer = asyncio.create_task(change() if superseded else quiet())  # both in one turn of the loop
    await asyncio.sleep(0)
    older.cancel()
    with pytest.raises(asyncio.CancelledError):
        await older
    newer.cancel()
    await asyncio.wait([newer])


@in_a_loop
async def test_a_change_that_two_newer_ones_supersede_names_the_first_of_them() -> None:
    changes = Changes()

    async def change(kind: str) -> None:
        async with changes.turn("a", kind):
            await asyncio.Event().wait()

    older = asyncio.create_task(change("publish"))
    await quiet()
    newer = [asyncio.create_task(change(kind)) for kind in ("rollback", "remove")]
    with pytest.raises(Superseded, match="this publish of 'a' was superseded by a newer rollback"):
        await older
    for one in newer:
        one.cancel()
    await asyncio.wait(newer)


@pytest.mark.usefixtures("hanging")
@in_a_loop
async def test_a_new_adapter_is_listed_while_it_is_published(world) -> None:
    async with world() as w:
        asked = await publishing(w, "a", "hang")
        (listed,) = (await w.api.get("/adapters")).json()["adapters"]
        assert (listed["name"], listed["state"], listed["version"]) == ("a", "fetching", None)
        asked.cancel()


@in_a_loop
async def test_a_canary_gets_requests_and_is_listed_with_its_weight_and_its_share(world, write_lora) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        await w.api.put("/adapters/a", json={"source": str(one)})
        answer = (await w.api.post("/adapters/a/canary", json={"source": str(two), "weight": 0.5})).json()
        assert (answer["canary"]["digest"], answer["canary"]["weight"]) == (version_digest(two), 0.5)
        assert answer["canary"]["share"] is None
        for caller in range(40):
            await w.answer("a", str(caller))
        shown = (await w.api.get("/adapters/a")).json()["canary"]
        assert 0.2 < shown["share"] < 0.8
        assert w.entry("a").canary.model_dump() == {
            "version": str(two), "digest": version_digest(two), "weight": 0.5,
        }  # fmt: skip
        assert (await w.api.delete("/adapters/a/canary")).json()["canary"] is None
        assert w.entry("a").canary is None


@pytest.mark.parametrize("body", [{}, {"source": "", "weight": 0.1}, {"source": "x"}, {"weight": 0.1}])
@in_a_loop
async def test_half_a_canary_ends_none(world, write_lora, body: dict[str, Any]) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        await w.api.post("/adapters/a/canary", json={"source": str(write_lora("two", 2.0)), "weight": 0.5})
        assert (await w.api.post("/adapters/a/canary", json=body)).status_code == 400
        assert w.fleet.aliases["a"].canary is not None


@in_a_loop
async def test_publishing_the_canarys_digest_keeps_its_source_and_ends_the_canary(world, write_lora) -> None:
    async with world() as w:
        two = write_lora("two", 2.0)
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        await w.api.post("/adapters/a/canary", json={"source": str(two), "weight": 0.5})
        await w.api.put("/adapters/a", json={"source": version_digest(two)})
        assert (w.entry("a").source, w.entry("a").canary) == (str(two), None)


@in_a_loop
async def test_pinning_keeps_the_version_that_serves_whatever_its_source_has_now(world, write_lora, tmp_path) -> None:
    async with world() as w:
        one = write_lora("one", 1.0)
        first = version_digest(one)
        await w.follow(README.format(source=one))
        await w.settled("sql")
        one.rename(tmp_path / "aside")
        write_lora("one", 2.0)
        assert (await w.api.post("/adapters/sql/pin")).json()["version"]["digest"] == first
        assert w.entry("sql").digest == first


@in_a_loop
async def test_an_adapter_that_is_not_served_yet_is_pinned_when_its_source_is_there(
    world, write_lora, tmp_path
) -> None:
    async with world() as w:
        await w.follow(README.format(source=tmp_path / "later"))
        await w.settled("sql")
        assert (await w.api.post("/adapters/sql/pin")).status_code == 422
        later = write_lora("later", 1.0)
        assert (await w.api.post("/adapters/sql/pin")).json()["version"]["digest"] == version_digest(later)


@in_a_loop
async def test_publishing_a_path_again_serves_its_present_files(world, write_lora, tmp_path) -> None:
    async with world() as w:
        place = write_lora("place", 1.0)
        first = (await w.api.put("/adapters/a", json={"source": str(place)})).json()
        place.rename(tmp_path / "old")
        write_lora("place", 2.0)
        second = (await w.api.put("/adapters/a", json={"source": str(place)})).json()
        assert second["version"]["digest"] != first["version"]["digest"]


@in_a_loop
async def test_changes_of_different_adapters_run_side_by_side(world, write_lora) -> None:
    async with world() as w:
        w.engine.gate.clear()
        sources = {name: str(write_lora(name, value)) for name, value in (("a", 1.0), ("b", 2.0))}
        asked = [asyncio.create_task(w.api.put(f"/adapters/{n}", json={"source": s})) for n, s in sources.items()]
        while [state.phase for state in w.control.changes.preparing().values()] != ["loading", "loading"]:
            await w.events.change()
        w.engine.gate.set()
        assert [(await one).status_code for one in asked] == [200, 200]


@in_a_loop
async def test_an_adapter_that_is_meant_to_change_nothing_is_served_with_the_permission(world, write_lora) -> None:
    async with world() as w:
        zero = str(write_lora("zero", 0.0))
        refused = await w.api.put("/adapters/a", json={"source": zero})
        assert "allow_no_effect" in refused.json()["error"]["message"]
        assert (await w.api.put("/adapters/a", json={"source": zero, "allow_no_effect": True})).is_success


@in_a_loop
async def test_a_pinned_version_that_was_replaced_makes_room(world, write_lora) -> None:
    async with world(capacity=1) as w:
        assert (await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0)), "pin": True})).is_success
        # the old one is pinned and the engine is full: both cannot be there at once, and the old one serves on
        asked = asyncio.create_task(w.api.put("/adapters/a", json={"source": str(write_lora("two", 2.0))}))
        while not w.clock.waited_for():
            await asyncio.sleep(0.001)
        await w.clock.advance(30)
        assert (await asked).status_code == 422
        assert (await w.api.delete("/adapters/a")).is_success
        assert (await w.api.put("/adapters/b", json={"source": str(write_lora("three", 3.0))})).is_success


@in_a_loop
async def test_a_prepared_version_serves_no_request_and_its_publication_reads_no_source(world, write_lora) -> None:
    async with world() as w:
        two = write_lora("two", 2.0)
        prepared = (await w.api.put("/prepared/b", json={"source": str(two)})).json()
        assert prepared["digest"] == version_digest(two)
        assert (await w.api.get("/adapters/b")).status_code == 404
        assert w.fleet.resolve(prepared["name"]) is None
        await w.residency.idle()
        assert not w.engine.loaded
        body = {"source": "/not/there", "digest": prepared["digest"]}
        assert (await w.api.put("/adapters/b", json=body)).status_code == 200
        refused = await w.api.put("/prepared/c", json={"source": "/not/there"})
        assert (refused.status_code, "was not prepared" in refused.text) == (422, True)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "is full: remove adapters, or give it more room"), (errno.EROFS, "cannot be written: Read-only")],
)
@in_a_loop
async def test_a_publish_into_a_full_or_read_only_store_changes_nothing_and_says_why(
    world, write_lora, monkeypatch, tmp_path, number: int, reason: str
) -> None:
    async with world(capacity=1) as w:
        for name, value in (("a", 1.0), ("b", 2.0)):
            await w.api.put(f"/adapters/{name}", json={"source": str(write_lora(name, value))})
        text, copy = w.file.read_text(), store_module._copy

        def fails(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(store_module, "_copy", fails)
        answer = await w.api.put("/adapters/c", json={"source": str(write_lora("c", 3.0))})
        assert answer.status_code == 422
        assert reason in answer.json()["error"]["message"]
        assert "tmp" not in answer.json()["error"]["message"].replace(str(tmp_path), "")
        assert w.file.read_text() == text
        assert not list((tmp_path / "store" / "staging").iterdir())
        assert [(await w.answer(name))[1] for name in "ab"] == [1.0, 2.0]  # each is loaded from the store
        monkeypatch.setattr(store_module, "_copy", copy)
        assert (await w.api.put("/adapters/c", json={"source": str(tmp_path / "c")})).status_code == 200


@in_a_loop
async def test_the_loop_of_the_requests_never_waits_for_the_disk_of_the_store(
    world, write_lora, monkeypatch, store
) -> None:
    """A network file system may hang for minutes; streams must not."""
    async with world() as w:
        for name, value in (("a", 1.0), ("b", 2.0)):
            await w.api.put(f"/adapters/{name}", json={"source": str(write_lora(name, value))})
        stat = os.stat

        def elsewhere(path: Any, *arguments: Any, **settings: Any) -> os.stat_result:
            on_loop = threading.current_thread() is threading.main_thread()
            assert not (on_loop and str(path).startswith(str(store.folder("").parent))), f"{path} on the loop"
            return stat(path, *arguments, **settings)

        monkeypatch.setattr(os, "stat", elsewhere)
        assert [(await w.answer(name))[1] for name in "ab"] == [1.0, 2.0]
        assert (await w.api.get("/adapters")).status_code == 200
        assert (await w.api.post("/adapters/a/unload")).json()["version"]["residency"] == "disk"
        await w.housekeeping.collect()
