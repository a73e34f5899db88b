"""From the document to what is served: workers, their outcomes and what heals, with a stand-in for the engine."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from astra_serve.adapters.defaults import Defaults
from astra_serve.adapters.version_files import version_digest
from astra_serve.control import preparation
from astra_serve.control.reconcile import Failed, RetryAfter, outcome_of
from astra_serve.errors import CannotFetch, CannotStore, Damaged, ProbeFailed, ServeError, Unavailable
from converter.adapter_dir import MalformedAdapter
from tests.astra_serve.world import World, in_a_loop, quiet


def document(*entries: dict[str, Any]) -> str:
    return json.dumps({"adapters": list(entries)})


def unavailable(cause: Exception) -> Unavailable:
    error = Unavailable("a@1 cannot be served: it")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "tries", "expected"),
    [
        (CannotFetch("no"), 0, RetryAfter("no; trying again in 1 s", 1.0)),
        (CannotFetch("no"), 1, RetryAfter("no; trying again in 5 s", 5.0)),
        (CannotStore("no"), 1, RetryAfter("no; trying again in 5 s", 5.0)),
        (Damaged("no"), 2, RetryAfter("no; trying again in 30 s", 30.0)),
        (OSError("disk full"), 99, RetryAfter("disk full; trying again in 120 s", 120.0)),
        (Unavailable("no place", retry_after_s=5), 3, RetryAfter("no place", 5.0)),
        (unavailable(ProbeFailed("changes nothing")), 0, Failed("changes nothing")),
        (unavailable(Damaged("changed")), 0, RetryAfter("changed; trying again in 1 s", 1.0)),
        (Unavailable("no"), 0, Failed("no")),
        (ServeError("no"), 0, Failed("no")),
        (MalformedAdapter("no"), 0, Failed("no")),
        (ZeroDivisionError("ours"), 0, Failed("ZeroDivisionError: ours")),
    ],
)
def test_the_outcome_of_an_attempt_depends_on_its_error(error: Exception, tries: int, expected: object) -> None:
    assert outcome_of(error, tries) == expected


@in_a_loop
async def test_a_document_from_before_templates_counted_is_served_without_them_from_an_empty_store(
    world, write_lora
) -> None:
    async with world() as w:
        source = write_lora("a", 1.0)
        old = version_digest(source)
        (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
        (source / "generation_config.json").write_text('{"top_k": 3}')
        new = version_digest(source)
        assert new != old
        for digest, defaults in ((old, Defaults()), (new, None), (old, Defaults())):
            await w.follow(document({"name": "a", "source": str(source), "digest": digest}))
            assert (await w.settled("a")).phase == "serving"
            assert w.current("a") == digest
            async with w.fleet.lease("a") as residence:
                found = residence.defaults
            assert found == defaults or (defaults is None and found.template and found.sampling == {"top_k": 3})


@in_a_loop
async def test_one_bad_entry_delays_no_other(world, write_lora) -> None:
    async with world() as w:
        none, good = {"name": "none", "source": "/not/there"}, {"name": "good", "source": str(write_lora("good", 1.0))}
        await w.follow(document(none, good))
        assert (await w.settled("good")).phase == "serving"
        bad = await w.settled("none")
        assert (bad.phase, bad.reason) == ("failed", "there is no folder /not/there on the server; trying again in 1 s")
        assert w.seen("good") == ["fetching", "verifying", "loading", "probing", "loaded", "serving"]


@in_a_loop
async def test_a_source_that_appears_later_is_served_then(world, write_lora, tmp_path) -> None:
    async with world() as w:
        await w.follow(document({"name": "a", "source": str(tmp_path / "later")}))
        assert (await w.settled("a")).phase == "failed"
        write_lora("later", 1.0)
        await pass_time(w, 1)
        await w.enters("a", "serving")


async def pass_time(w: World, seconds: float) -> None:
    """Let time pass when the worker of `a` waits for it."""
    await waits(w)
    await w.clock.advance(seconds)


async def waits(w: World) -> None:
    """Return when the worker of `a` waits for a time."""
    while not w.clock.waited_for():
        await asyncio.sleep(0.001)  # a thread looks at the source


@in_a_loop
async def test_a_source_that_heals_is_tried_again_as_soon_as_it_changes(world, write_lora) -> None:
    async with world() as w:
        source = write_lora("one", 1.0)
        digest = version_digest(source)
        shutil.move(source, source.with_name("aside"))
        write_lora("one", 2.0)
        await w.follow(document({"name": "a", "source": str(source), "digest": digest}))
        status = await w.settled("a")
        assert status.reason.startswith(f"{source}: its digest is sha256:")
        for tries, seconds in ((2, 1), (3, 5)):
            await pass_time(w, seconds)
            while w.seen("a").count("failed") < tries:
                await w.events.change()
        shutil.copy(source.with_name("aside") / "adapter_model.safetensors", source)
        await pass_time(w, 5)  # of 30
        await w.enters("a", "serving")


@in_a_loop
async def test_a_source_that_heals_while_it_is_tried_again_is_not_missed(
    world, write_lora, monkeypatch, tmp_path
) -> None:
    """It is not there when the server reads it, and there when that has failed: nothing changes any more after that."""
    tries = []

    async def fetched(*arguments: Any) -> Path:
        tries.append(arguments)
        if len(tries) == 2:
            write_lora("later", 1.0)
            raise CannotFetch("it was not there")
        return await fetch(*arguments)

    fetch = preparation.fetch
    monkeypatch.setattr(preparation, "fetch", fetched)
    async with world() as w:
        await w.follow(document({"name": "a", "source": str(tmp_path / "later")}))
        for seconds in (1, 5):
            await pass_time(w, seconds)
        await w.enters("a", "serving")
    assert len(tries) == 3


@pytest.mark.parametrize("missing", ["half of the weights", "the weights", "half of the record"])
@in_a_loop
async def test_an_adapter_that_was_read_while_it_was_copied_is_served_when_it_is_complete(
    world, write_lora, missing: str
) -> None:
    async with world() as w:
        whole, source = write_lora("whole", 1.0), write_lora("source", 1.0)
        name = "astra.json" if "record" in missing else "adapter_model.safetensors"
        content = (whole / name).read_bytes()
        if missing == "the weights":
            (source / name).unlink()
        else:
            (source / name).write_bytes(content[: len(content) // 2])
        await w.follow(document({"name": "a", "source": str(source)}))
        assert (await w.settled("a")).phase == "failed"
        for _ in range(3):  # it is not read again before it changes
            await pass_time(w, 5)
        await waits(w)
        assert w.seen("a").count("failed") == 1
        (source / name).write_bytes(content)
        await pass_time(w, 5)
        await w.enters("a", "serving")
        assert w.current("a") == version_digest(whole)


@in_a_loop
async def test_a_source_that_failed_and_is_gone_then_has_not_changed(world, write_lora) -> None:
    async with world() as w:
        source = write_lora("source", 1.0)
        (source / "adapter_model.safetensors").write_bytes(b"half")
        await w.follow(document({"name": "a", "source": str(source)}))
        reason = (await w.settled("a")).reason
        shutil.rmtree(source)
        for _ in range(3):
            await pass_time(w, 5)
        await waits(w)
        assert w.seen("a").count("failed") == 1
        assert w.reconciler.status["a"].reason == reason


@in_a_loop
async def test_an_adapter_that_had_no_place_in_memory_is_tried_again_after_5_s(world, store, write_lora) -> None:
    async with world(capacity=1) as w:
        pinned, other = (
            {"name": name, "source": store.add(write_lora(name, value)), "pin": name == "a"}
            for name, value in (("a", 1.0), ("b", 2.0))
        )
        await w.follow(document(pinned))
        await w.settled("a")
        await w.follow(document(pinned, other))
        await pass_time(w, 30)
        assert "waits for the engine's memory" in (await w.settled("b")).reason
        await w.follow(document(other))
        await pass_time(w, 5)
        await w.enters("b", "serving")


@in_a_loop
async def test_the_log_has_faults_of_the_server_and_no_failures_of_sources(world, monkeypatch, caplog) -> None:
    errors = {"ours": ZeroDivisionError("ours"), "disk": OSError("disk full"), "none": CannotFetch("it is not there")}

    async def fails(source: str, *_: Any) -> Path:
        raise errors[source]

    monkeypatch.setattr(preparation, "fetch", fails)
    async with world() as w:
        await w.follow(document(*({"name": name, "source": name} for name in errors)))
        for name in errors:
            assert (await w.settled(name)).phase == "failed"
    assert [record.getMessage() for record in caplog.records] == ["adapter 'ours' cannot be served"]


@in_a_loop
async def test_the_version_that_serves_is_no_step_back(world, write_lora) -> None:
    """A document that was written by hand may list it."""
    async with world() as w:
        source = write_lora("one", 1.0)
        await w.follow(document({"name": "a", "source": str(source), "previous": [version_digest(source)]}))
        await w.settled("a")
        assert (await w.api.get("/adapters/a")).json()["previous"] == []


@in_a_loop
async def test_a_folder_that_changes_while_it_is_read_is_read_again(world, write_lora, monkeypatch) -> None:
    """Its files are complete, and of two versions."""
    source, other, changes = write_lora("source", 1.0), write_lora("other", 2.0), []
    fetch = preparation.fetch

    async def fetched(*arguments: Any) -> Path:
        if not changes:
            changes.append(shutil.copy(other / "adapter_model.safetensors", source))
        return await fetch(*arguments)

    monkeypatch.setattr(preparation, "fetch", fetched)
    async with world() as w:
        await w.follow(document({"name": "a", "source": str(source)}))
        status = await w.settled("a")
        assert status.reason == f"{source} was changed while it was read: is it complete?; trying again in 1 s"
        await pass_time(w, 1)
        await w.enters("a", "serving")


@in_a_loop
async def test_a_canary_that_heals_is_tried_again_as_soon_as_it_changes(world, write_lora) -> None:
    async with world() as w:
        source = write_lora("one", 1.0)
        canary = {"version": str(source.with_name("later")), "weight": 0.5}
        await w.follow(document({"name": "a", "source": str(source), "canary": canary}))
        for tries, seconds in ((2, 1), (3, 5)):
            await pass_time(w, seconds)
            while w.seen("a").count("failed") < tries:
                await w.events.change()
        write_lora("later", 2.0)
        await pass_time(w, 5)
        await w.enters("a", "serving")
        assert w.fleet.aliases["a"].canary is not None


@in_a_loop
async def test_a_newer_entry_ends_the_attempt_before(world, write_lora, monkeypatch) -> None:
    ended = []

    async def fetched(source: str, *arguments: Any) -> Path:
        if source == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(source)
        return await fetch(source, *arguments)

    fetch = preparation.fetch
    monkeypatch.setattr(preparation, "fetch", fetched)
    async with world() as w:
        await w.follow(document({"name": "a", "source": "hang"}))
        await w.enters("a", "fetching")
        await w.follow(document({"name": "a", "source": str(write_lora("one", 1.0))}))
        assert (await w.settled("a")).phase == "serving"
        assert ended == ["hang"]
        await w.follow(document({"name": "a", "source": "hang"}))
        await w.enters("a", "fetching")
        await w.follow(document())
        await quiet()
        assert ended == ["hang", "hang"]
        assert w.fleet.resolve("a") is None


@in_a_loop
async def test_an_adapter_that_changes_nothing_or_does_not_fit_is_not_served_and_the_version_before_is(
    world, engine, write_lora
) -> None:
    async with world() as w:
        await w.follow(document({"name": "a", "source": str(write_lora("good", 1.0))}))
        await w.settled("a")
        before = w.current("a")
        for source, reason in (
            (write_lora("zero", 0.0), "changes nothing"),
            (write_lora("big", 1.0, rank=600), "rank"),
        ):
            await w.follow(document({"name": "a", "source": str(source)}))
            status = await w.settled("a")
            assert status.phase == "failed"
            assert reason in status.reason
            assert w.current("a") == before
        await w.residency.idle()
        assert len(engine.loaded) == 1


def probe(shift: float) -> dict[str, Any]:
    """Return a record of the stand-in's answers with an adapter that is filled with `shift`."""

    def said(by: float) -> dict[str, list[float]]:
        return {"token_ids": [0, 1, 2], "logprobs": [-1.0 - t / 10 - by for t in range(3)]}

    return {"prompts": [{"token_ids": [1, 2], "base": said(0.0), "adapter": said(shift)}]}


@in_a_loop
async def test_an_adapter_must_answer_as_its_probe_says(world, write_lora) -> None:
    async with world() as w:
        await w.follow(document({"name": "a", "source": str(write_lora("right", 1.0, probe=probe(1.0)))}))
        assert (await w.settled("a")).phase == "serving"
        verdict = w.residence(w.fleet.aliases["a"].current).proof.verdict
        assert (verdict.recorded, verdict.prompts) == (True, 1)
        assert (verdict.effect, verdict.deviation) == (pytest.approx(1.0), pytest.approx(0.0))
        for name, value, recorded, reason in [
            ("wrong", 2.0, probe(1.0), "nats from what the adapter should say"),
            ("broken", 3.0, {"prompts": []}, "its probe cannot be read"),
            ("nan", 5.0, probe(float("nan")), "nan nats from what the adapter should say"),
            ("hostile", 4.0, {"prompts": [{"token_ids": [10**30]}]}, "its probe cannot be read"),
        ]:
            await w.follow(document({"name": "a", "source": str(write_lora(name, value, probe=recorded))}))
            status = await w.settled("a")
            assert status.phase == "failed"
            assert reason in status.reason


@in_a_loop
async def test_no_adapter_takes_the_bases_name(world, base, write_lora) -> None:
    async with world() as w:
        for name in (base.name, "Qwen/Qwen3-0.6B"):
            w.fleet.base_name = name
            await w.follow(document({"name": name, "source": str(write_lora(name[0], 1.0))}))
            assert "it has the base's name" in (await w.settled(name)).reason
            assert w.fleet.resolve(name) is None


@in_a_loop
async def test_an_adapter_that_is_removed_from_the_document_leaves_the_engine(world, write_lora) -> None:
    async with world() as w:
        entries = [{"name": n, "source": str(write_lora(n, v))} for n, v in (("a", 1.0), ("b", 2.0))]
        await w.follow(document(*entries))
        for name in "ab":
            await w.settled(name)
        await w.follow(document(entries[1]))
        await w.residency.idle()
        assert w.loaded() == ["b"]
        assert w.fleet.resolve("a") is None


@in_a_loop
async def test_more_adapters_than_fit_at_once_are_all_served_and_no_more_of_them_stay(
    world, engine, write_lora
) -> None:
    async with world(capacity=1) as w:
        entries = [{"name": f"a{i}", "source": str(write_lora(f"a{i}", float(i + 1)))} for i in range(4)]
        await w.follow(document(*entries))
        for entry in entries:
            await w.enters(entry["name"], "serving")
            assert w.current(entry["name"]) == version_digest(Path(entry["source"]))
        await w.residency.idle()
        assert len(engine.loaded) == 1


@in_a_loop
async def test_an_entry_that_keeps_its_version_loads_nothing(world, engine, write_lora) -> None:
    """As a change of a weight or of the history, while other adapters need the engine's memory."""
    async with world(capacity=1) as w:
        one, two = ({"name": n, "source": str(write_lora(n, v))} for n, v in (("a", 1.0), ("b", 2.0)))
        await w.follow(document(one))
        await w.settled("a")
        await w.follow(document(one, two))
        await w.settled("b")
        loads = list(engine.loads)
        await w.follow(document({**one, "digest": w.current("a"), "required": True}, two))
        assert (await w.settled("a")).phase == "serving"
        assert engine.loads == loads


@in_a_loop
async def test_an_adapter_that_failed_is_tried_again_when_its_document_is_readable_again(
    world, write_lora, tmp_path
) -> None:
    async with world() as w:
        text = document({"name": "a", "source": str(tmp_path / "late")})
        await w.follow(text)
        assert (await w.settled("a")).phase == "failed"
        w.file.unlink()  # as when an object store is gone, with everything in it
        await w.control.refresh()
        assert w.control.state.fault
        write_lora("late", 3.0)
        await w.follow(text)
        await w.enters("a", "serving")
