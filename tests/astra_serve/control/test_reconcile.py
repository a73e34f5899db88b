"""From the document to what is served, and the admin API, with a stand-in for the engine."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from astra_serve.adapters.fetch import fetch
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store, version_digest
from astra_serve.control import admin, reconcile
from astra_serve.control.control import Control
from astra_serve.control.reconcile import Reconciler
from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Document
from astra_serve.errors import CannotFetch, ServeError, Unavailable
from astra_serve.gateway.middleware import Gateway
from tests.astra_serve.adapters.test_fleet import in_a_loop
from tests.astra_serve.conftest import StandInEngine, write_document

TOKEN = "secret"  # noqa: S105


class World:
    def __init__(self, fleet: Fleet, reconciler: Reconciler, control: Control, api: httpx.AsyncClient) -> None:
        self.fleet, self.reconciler, self.control, self.api = fleet, reconciler, control, api

    def current(self, name: str) -> str | None:
        alias = self.fleet.aliases.get(name)
        return alias.current.digest if alias else None


@pytest.fixture
def world(engine: StandInEngine, store, base, tmp_path: Path) -> Callable[[], Any]:
    @asynccontextmanager
    async def make(capacity: int = 2) -> AsyncIterator[World]:
        engine.capacity = capacity
        fleet = Fleet(engine, store, base, capacity, wait_s=2)
        reconciler = Reconciler(fleet, store, drain_s=1)
        control = Control(str(tmp_path / "adapters.yaml"), fleet, reconciler)
        transport = httpx.ASGITransport(admin.build(control, Gateway(fleet), TOKEN))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://admin", headers=headers) as api:
            yield World(fleet, reconciler, control, api)
        await reconciler.close()

    return make


def document(*entries: dict[str, Any]) -> Document:
    return Document(adapters=[Adapter.model_validate(entry) for entry in entries])


@in_a_loop
async def test_a_document_is_made_true_and_one_bad_entry_delays_nobody(world, write_lora) -> None:
    async with world() as w:
        w.reconciler.apply(
            document(
                {"name": "none", "source": "/not/there"},
                {"name": "good", "source": str(write_lora("good", 1.0))},
            )
        )
        assert (await w.reconciler.settled("good")).state == "serving"
        bad = await w.reconciler.settled("none")
        assert bad.state == "failed"
        assert "there is no folder /not/there; trying again in 1 s" in (bad.reason or "")
        assert [e.event for e in w.fleet.journal.events if e.adapter == "good"] == [
            "fetching", "verifying", "loading", "probing", "loaded", "serving",
        ]  # fmt: skip


@in_a_loop
async def test_a_source_that_comes_later_is_served_then(world, write_lora, tmp_path) -> None:
    async with world() as w:
        w.reconciler.apply(document({"name": "a", "source": str(tmp_path / "later")}))
        assert (await w.reconciler.settled("a")).state == "failed"
        write_lora("later", 1.0)
        while w.reconciler.status["a"].state != "serving":
            await w.fleet.journal.change()


@in_a_loop
async def test_an_adapter_that_changes_nothing_or_does_not_load_is_not_served_and_the_old_one_serves_on(
    world, engine, write_lora
) -> None:
    async with world() as w:
        good = write_lora("good", 1.0)
        w.reconciler.apply(document({"name": "a", "source": str(good)}))
        await w.reconciler.settled("a")
        before = w.current("a")
        for source, reason in (
            (write_lora("zero", 0.0), "changes nothing"),
            (write_lora("big", 1.0, rank=600), "rank"),
        ):
            w.reconciler.apply(document({"name": "a", "source": str(source)}))
            status = await w.reconciler.settled("a")
            assert status.state == "failed"
            assert reason in (status.reason or "")
            assert w.current("a") == before
        await w.fleet.drained()
        assert len(engine.loaded) == 1


def probe(shift: float) -> dict[str, Any]:
    """What the stand-in says with an adapter that is filled with `shift`."""

    def said(by: float) -> dict[str, list[float]]:
        return {"token_ids": [0, 1, 2], "logprobs": [-1.0 - t / 10 - by for t in range(3)]}

    return {"prompts": [{"token_ids": [1, 2], "base": said(0.0), "adapter": said(shift)}]}


@in_a_loop
async def test_an_adapter_must_say_what_its_probe_says(world, write_lora) -> None:
    async with world() as w:
        w.reconciler.apply(document({"name": "a", "source": str(write_lora("right", 1.0, probe=probe(1.0)))}))
        assert (await w.reconciler.settled("a")).state == "serving"
        record = w.reconciler.record(w.fleet.aliases["a"].current)["probe"]
        assert record == {"recorded": True, "prompts": 1, "effect": pytest.approx(1.0), "deviation": pytest.approx(0.0)}
        for name, value, recorded, reason in [
            ("wrong", 2.0, probe(1.0), "nats from what the adapter should say"),
            ("broken", 3.0, {"prompts": []}, "its probe cannot be read"),
            ("nan", 5.0, probe(float("nan")), "nan nats from what the adapter should say"),
            ("hostile", 4.0, {"prompts": [{"token_ids": [10**30]}]}, "its probe cannot be read"),
        ]:
            w.reconciler.apply(document({"name": "a", "source": str(write_lora(name, value, probe=recorded))}))
            status = await w.reconciler.settled("a")
            assert status.state == "failed"
            assert reason in (status.reason or "")


@in_a_loop
async def test_no_adapter_takes_the_bases_name(world, base, write_lora) -> None:
    async with world() as w:
        w.reconciler.apply(document({"name": base.name, "source": str(write_lora("one", 1.0))}))
        assert "it has the base's name" in ((await w.reconciler.settled(base.name)).reason or "")
        assert w.fleet.resolve(base.name) is None


@in_a_loop
async def test_what_leaves_the_document_leaves_the_engine(world, engine, write_lora) -> None:
    async with world() as w:
        entries = [{"name": n, "source": str(write_lora(n, v))} for n, v in (("a", 1.0), ("b", 2.0))]
        w.reconciler.apply(document(*entries))
        for name in "ab":
            await w.reconciler.settled(name)
        w.reconciler.apply(document(entries[1]))
        await w.fleet.drained()
        assert [name.partition("@")[0] for name in engine.loaded] == ["b"]
        assert w.fleet.resolve("a") is None


@in_a_loop
async def test_publishing_rolling_back_and_removing_over_the_admin_api(world, write_lora, tmp_path) -> None:
    async with world() as w:
        one, two = write_lora("one", 1.0), write_lora("two", 2.0)
        first = (await w.api.put("/adapters/a", json={"source": str(one)})).json()
        assert first["state"] == "serving"
        second = (await w.api.put("/adapters/a", json={"source": str(two), "pin": True})).json()
        assert second["version"]["digest"] != first["version"]["digest"]
        assert [v["digest"] for v in second["previous"]] == [first["version"]["digest"]]
        written = desired.parse((tmp_path / "adapters.yaml").read_text(), "x").get("a")
        assert written is not None
        assert (written.digest, written.pin) == (second["version"]["digest"], True)

        back = (await w.api.post("/adapters/a/rollback")).json()
        assert back["version"]["digest"] == first["version"]["digest"]
        assert [v["digest"] for v in back["previous"]] == [second["version"]["digest"]]
        assert (await w.api.post("/adapters/a/rollback", json={"digest": "sha256:" + 64 * "0"})).status_code == 409

        canary = await w.api.post("/adapters/a/canary", json={"source": second["version"]["digest"], "weight": 0.5})
        assert canary.json()["canary"]["weight"] == 0.5
        assert {w.fleet.resolve("a", str(i)).digest for i in range(50)} == {
            first["version"]["digest"], second["version"]["digest"],
        }  # fmt: skip
        assert (await w.api.post("/adapters/a/canary", json={})).json()["canary"] is None

        assert (await w.api.delete("/adapters/a")).json()["state"] == "removed"
        assert (await w.api.get("/adapters/a")).status_code == 404
        assert desired.parse((tmp_path / "adapters.yaml").read_text(), "x").adapters == []


@in_a_loop
async def test_a_failed_publication_changes_nothing(world, write_lora, tmp_path) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        before, current = (tmp_path / "adapters.yaml").read_text(), w.current("a")
        for source in ("/not/there", str(write_lora("zero", 0.0))):
            answer = await w.api.put("/adapters/a", json={"source": source})
            assert answer.status_code == 422
            assert "was not published" in answer.json()["error"]["message"]
        assert (await w.api.put("/adapters/new", json={"source": "/not/there"})).status_code == 422
        assert (tmp_path / "adapters.yaml").read_text() == before
        assert w.current("a") == current
        assert w.fleet.resolve("new") is None
        assert (await w.api.get("/adapters/a")).json()["state"] == "serving"
        assert (await w.api.get("/adapters/new")).status_code == 404


@in_a_loop
async def test_changes_of_different_adapters_do_not_disturb_each_other(world, engine, write_lora) -> None:
    async with world() as w:
        engine.delay = 0.05
        sources = {name: str(write_lora(name, value)) for name, value in (("a", 1.0), ("b", 2.0))}
        answers = await asyncio.gather(*(w.api.put(f"/adapters/{n}", json={"source": s}) for n, s in sources.items()))
        assert [answer.status_code for answer in answers] == [200, 200]
        again = str(write_lora("again", 3.0))
        slow, pinned = await asyncio.gather(
            w.api.put("/adapters/a", json={"source": again}), w.api.post("/adapters/b/pin", json={})
        )
        assert (slow.json()["source"], pinned.json()["pin"]) == (again, True)


@in_a_loop
async def test_changes_of_one_adapter_follow_each_other_and_lose_nothing(world, engine, write_lora) -> None:
    async with world() as w:
        engine.delay = 0.02
        one = (await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})).json()
        await asyncio.gather(
            w.api.put("/adapters/a", json={"source": str(write_lora("two", 2.0))}), w.api.post("/adapters/a/pin")
        )
        found = (await w.api.get("/adapters/a")).json()
        assert found["pin"] is True
        assert found["version"]["digest"] != one["version"]["digest"]
        assert [v["digest"] for v in found["previous"]] == [one["version"]["digest"]]


@in_a_loop
async def test_publishing_a_path_again_serves_what_is_there_now(world, write_lora, tmp_path) -> None:
    async with world() as w:
        place = write_lora("place", 1.0)
        first = (await w.api.put("/adapters/a", json={"source": str(place)})).json()
        place.rename(tmp_path / "old")
        write_lora("place", 2.0)
        second = (await w.api.put("/adapters/a", json={"source": str(place)})).json()
        assert second["version"]["digest"] != first["version"]["digest"]


@in_a_loop
async def test_what_others_change_in_the_document_meanwhile_is_kept_and_followed(world, write_lora, tmp_path) -> None:
    async with world(capacity=3) as w:
        sources = {name: str(write_lora(name, value)) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
        await w.api.put("/adapters/a", json={"source": sources["a"]})
        file = tmp_path / "adapters.yaml"
        by_hand = desired.parse(file.read_text(), "x").with_adapter(Adapter(name="b", source=sources["b"]))
        write_document(file, by_hand)  # and nobody has read it yet
        assert (await w.api.put("/adapters/c", json={"source": sources["c"]})).is_success
        assert {entry.name for entry in desired.parse(file.read_text(), "x").adapters} == {"a", "b", "c"}
        assert (await w.reconciler.settled("b")).state == "serving"
        file.write_text("adapters: [{name: half}")
        answer = await w.api.put("/adapters/a", json={"source": sources["b"]})
        assert answer.status_code == 409
        assert w.fleet.aliases["a"].current.digest == version_digest(Path(sources["a"]))
        assert "the document cannot be changed" in answer.json()["error"]["message"]
        assert file.read_text() == "adapters: [{name: half}"


@in_a_loop
async def test_what_was_damaged_while_it_served_is_fetched_again(world, engine, write_lora, store) -> None:
    async with world(capacity=1) as w:
        source = write_lora("one", 1.0)
        await w.api.put("/adapters/a", json={"source": str(source)})
        current = w.fleet.aliases["a"].current
        await w.fleet.places.unload(current)
        store.discard(current.digest)
        with pytest.raises(Unavailable):
            async with w.fleet.lease("a"):
                pass
        w.reconciler.tend()
        assert (await w.reconciler.settled("a")).state == "serving"
        events = [event for event in w.fleet.journal.events if event.event == "failed"]
        assert "is gone from the store" in (events[-1].reason or "")
        async with w.fleet.lease("a") as held:
            assert held is not None
            assert engine.loaded[held.handle] == 1.0


@in_a_loop
async def test_an_adapter_that_is_meant_to_change_nothing_is_served_when_that_is_said(world, write_lora) -> None:
    async with world() as w:
        zero = str(write_lora("zero", 0.0))
        refused = await w.api.put("/adapters/a", json={"source": zero})
        assert "allow_no_effect" in refused.json()["error"]["message"]
        assert (await w.api.put("/adapters/a", json={"source": zero, "allow_no_effect": True})).is_success


@in_a_loop
async def test_an_alias_a_place_and_the_whole_server_can_be_given_up(world, write_lora) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        one = w.fleet.aliases["a"].current
        other = (await w.api.post("/adapters/b/alias", json={"version": one.name})).json()
        assert other["version"]["digest"] == one.digest
        assert (await w.api.post("/adapters/b/alias", json={"version": "a@000000"})).status_code == 404
        assert (await w.api.post("/adapters/a/unload")).json()["version"]["residency"] == "disk"
        await w.api.post("/adapters/a/pin")
        assert (await w.api.post("/adapters/a/unload")).status_code == 409
        assert (await w.api.post("/drain")).json() == {"drained": True, "running": 0}
        assert (await w.api.get("/requests")).json()["drained"] is True
        assert (await w.api.delete("/drain")).json()["drained"] is False


@in_a_loop
async def test_a_publish_that_loses_a_race_leaves_what_the_document_says_by_then(world, write_lora, tmp_path) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        theirs = {"name": "a", "source": str(write_lora("theirs", 2.0))}

        async def raced(*_: Any) -> None:
            write_document(tmp_path / "adapters.yaml", document(theirs))
            await w.control.refresh()
            raise ServeError("somebody else has changed 'a' in the document meanwhile: try again")

        w.control._edit = raced
        answer = await w.api.put("/adapters/a", json={"source": str(write_lora("ours", 3.0))})
        assert answer.status_code == 409
        assert w.reconciler.status["a"].entry == Adapter.model_validate(theirs)
        assert (await w.reconciler.settled("a")).state == "serving"


@in_a_loop
async def test_a_source_that_heals_is_tried_again_as_soon_as_it_changes(world, write_lora, monkeypatch) -> None:
    monkeypatch.setattr(reconcile, "RETRIES_S", (1000.0,))
    monkeypatch.setattr(reconcile, "LOOK_S", 0.05)
    async with world() as w:
        source = write_lora("one", 1.0)
        digest = version_digest(source)
        shutil.move(source, source.with_name("aside"))
        write_lora("one", 2.0)
        w.reconciler.apply(document({"name": "a", "source": str(source), "digest": digest}))
        status = await w.reconciler.settled("a")
        assert status.state == "failed"
        assert f"{source}: its digest is sha256:" in (status.reason or "")
        shutil.copy(source.with_name("aside") / "adapter_model.safetensors", source)
        async with asyncio.timeout(10):
            while w.reconciler.status["a"].state != "serving":
                await w.fleet.journal.change()


@in_a_loop
async def test_a_source_that_heals_while_it_is_tried_again_is_not_missed(
    world, write_lora, monkeypatch, tmp_path
) -> None:
    """It is not there when the server reads it, and there when that has failed: nothing changes any more after that."""
    tries = []

    def fetched(*arguments: Any) -> Path:
        tries.append(arguments)
        if len(tries) == 2:
            write_lora("later", 1.0)
            raise CannotFetch("it was not there")
        return fetch(*arguments)

    monkeypatch.setattr(reconcile, "RETRIES_S", (0.05, 1000.0))
    monkeypatch.setattr(reconcile, "LOOK_S", 0.05)
    monkeypatch.setattr(reconcile, "fetch", fetched)
    async with world() as w:
        w.reconciler.apply(document({"name": "a", "source": str(tmp_path / "later")}))
        async with asyncio.timeout(10):
            while w.reconciler.status["a"].state != "serving":
                await w.fleet.journal.change()
    assert len(tries) == 3


@in_a_loop
async def test_a_canary_that_heals_is_tried_again_as_soon_as_it_changes(world, write_lora, monkeypatch) -> None:
    monkeypatch.setattr(reconcile, "RETRIES_S", (0.05, 1000.0))
    monkeypatch.setattr(reconcile, "LOOK_S", 0.05)
    async with world() as w:
        source = write_lora("one", 1.0)
        later = source.with_name("later")
        w.reconciler.apply(
            document({"name": "a", "source": str(source), "canary": {"version": str(later), "weight": 0.5}})
        )
        while sum(event.event == "failed" for event in w.fleet.journal.events) < 2:
            await w.fleet.journal.change()
        write_lora("later", 2.0)
        async with asyncio.timeout(10):
            while w.reconciler.status["a"].state != "serving":
                await w.fleet.journal.change()


@in_a_loop
async def test_it_is_not_ready_before_the_document_was_read_once(world, tmp_path) -> None:
    async with world() as w:
        (tmp_path / "adapters.yaml").write_text("adapters: 3")
        await w.control.refresh()
        assert "adapters" in w.control.not_ready()[0]
        (tmp_path / "adapters.yaml").write_text("adapters: []")
        await w.control.refresh()
        assert w.control.not_ready() == []


@in_a_loop
async def test_required_adapters_of_the_first_document_gate_readiness_and_a_later_one_takes_no_server_out(
    world, write_lora, tmp_path
) -> None:
    def write(*entries: dict[str, Any]) -> None:
        write_document(tmp_path / "adapters.yaml", document(*entries))

    good = {"name": "good", "source": str(write_lora("good", 1.0)), "required": True}
    bad = {"name": "bad", "source": "/not/there", "required": True}
    optional = {"name": "optional", "source": "/not/there"}
    async with world() as w:
        write(good, bad, optional)
        await w.control.refresh()
        assert w.reconciler.not_ready() == ["good: pending", "bad: pending"]
        assert (await w.reconciler.settled("good")).state == "serving"
        assert (await w.reconciler.settled("bad")).state == "failed"
        assert w.reconciler.not_ready() == ["bad: failed"]
        write(good, {**bad, "required": False}, optional)
        await w.control.refresh()
        assert w.reconciler.not_ready() == []
        write(good, bad)
        await w.control.refresh()
        assert (await w.reconciler.settled("bad")).state == "failed"
        assert w.reconciler.not_ready() == []  # all replicas read this


@in_a_loop
async def test_a_document_that_is_gone_or_empty_changes_nothing(world, write_lora, tmp_path) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        for spoil in (lambda f: f.write_text(""), lambda f: f.write_bytes(b"\xff"), lambda f: f.unlink()):
            spoil(tmp_path / "adapters.yaml")
            await w.control.refresh()
            assert w.control.fault
            assert w.current("a") is not None
        (tmp_path / "adapters.yaml").write_text("adapters: []")
        await w.control.refresh()
        assert w.control.fault is None
        assert w.current("a") is None


@in_a_loop
async def test_more_adapters_than_fit_at_once_are_all_served_and_no_more_of_them_stay(
    world, engine, write_lora
) -> None:
    async with world(capacity=1) as w:
        entries = [{"name": f"a{i}", "source": str(write_lora(f"a{i}", float(i + 1)))} for i in range(4)]
        w.reconciler.apply(document(*entries))
        for entry in entries:
            while w.reconciler.status[entry["name"]].state != "serving":
                await w.fleet.journal.change()
        assert [w.current(entry["name"]) for entry in entries] == [
            version_digest(Path(entry["source"])) for entry in entries
        ]
        await w.fleet.drained()
        assert len(engine.loaded) == 1


@in_a_loop
async def test_a_pinned_version_that_was_replaced_makes_room(world, write_lora) -> None:
    async with world(capacity=1) as w:
        assert (await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0)), "pin": True})).is_success
        # the old one is pinned and the engine is full: both cannot be there at once, and the old one serves on
        assert (await w.api.put("/adapters/a", json={"source": str(write_lora("two", 2.0))})).status_code == 422
        assert (await w.api.delete("/adapters/a")).is_success
        assert (await w.api.put("/adapters/b", json={"source": str(write_lora("three", 3.0))})).is_success


@in_a_loop
async def test_the_store_keeps_what_is_referenced_and_a_few_more(world, write_lora, store) -> None:
    async with world() as w:
        digests = []
        for i in range(1, 16):
            answer = await w.api.put("/adapters/a", json={"source": str(write_lora(str(i), float(i)))})
            digests.append(answer.json()["version"]["digest"])
        await w.fleet.drained()
        w.reconciler.tend()
        there = [digest in store for digest in digests]
        assert all(there[-9:])  # the current one and the eight that a rollback may go to
        assert sum(there) <= 9 + 3


@in_a_loop
async def test_the_admin_api_opens_to_its_token_alone(world) -> None:
    async with world() as w:
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            for method, path in (("GET", "/adapters"), ("PUT", "/adapters/a"), ("POST", "/v1/load_lora_adapter")):
                answer = await w.api.request(method, path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "AuthenticationError"


@in_a_loop
async def test_bad_admin_requests_get_their_reason(world, write_lora) -> None:
    async with world() as w:
        assert (await w.api.put("/adapters/a b", json={"source": str(write_lora("x", 1.0))})).status_code == 400
        assert (await w.api.put("/adapters/a", json={"sorce": "x"})).status_code == 422
        assert (await w.api.post("/adapters/a/rollback", json={"digest": "x"})).status_code == 422
        assert (await w.api.post("/adapters/a/canary", json={"source": "x"})).status_code == 400
        for source in ("sha256:../../etc", "simplecache::file:///etc"):
            assert (await w.api.put("/adapters/a", json={"source": source})).status_code == 422
        for path in ("rollback", "pin", "canary"):
            assert (await w.api.post(f"/adapters/none/{path}", json={})).status_code == 404


@in_a_loop
async def test_vllms_own_admin_calls_are_the_same_lifecycle(world, write_lora) -> None:
    async with world() as w:
        body = {"lora_name": "a", "lora_path": str(write_lora("one", 1.0))}
        assert (await w.api.post("/v1/load_lora_adapter", json=body)).status_code == 200
        assert w.current("a") is not None
        assert (await w.api.post("/v1/unload_lora_adapter", json={"lora_name": "a"})).status_code == 200
        assert w.current("a") is None


@in_a_loop
async def test_the_documents_file_is_followed_and_a_fault_in_it_changes_nothing(world, write_lora, tmp_path) -> None:
    async with world() as w:
        file = tmp_path / "adapters.yaml"
        write_document(file, document({"name": "a", "source": str(write_lora("one", 1.0))}))
        following = asyncio.create_task(w.control.follow())
        while w.current("a") is None:
            await asyncio.sleep(0.01)
        first = w.current("a")
        file.write_text("adapters: [{name: a}]")
        while w.control.fault is None:
            await asyncio.sleep(0.01)
        assert "adapters.0.source: Field required" in w.control.fault
        assert w.current("a") == first
        write_document(file, document({"name": "a", "source": str(write_lora("two", 2.0))}))
        while w.current("a") == first:
            await asyncio.sleep(0.01)
        assert (await w.api.get("/adapters")).json()["document"]["fault"] is None
        following.cancel()


@in_a_loop
async def test_a_config_map_is_followed_through_its_links(world, write_lora, tmp_path) -> None:
    """Kubernetes mounts adapters.yaml -> ..data/adapters.yaml, and swaps the link ..data."""
    async with world() as w:
        for number, source in enumerate((write_lora("one", 1.0), write_lora("two", 2.0))):
            (tmp_path / f"..{number}").mkdir()
            write_document(tmp_path / f"..{number}" / "adapters.yaml", document({"name": "a", "source": str(source)}))
        (tmp_path / "..data").symlink_to("..0")
        (tmp_path / "adapters.yaml").symlink_to("..data/adapters.yaml")
        following = asyncio.create_task(w.control.follow())
        while w.current("a") is None:
            await asyncio.sleep(0.01)
        first = w.current("a")
        (tmp_path / "new").symlink_to("..1")
        (tmp_path / "new").replace(tmp_path / "..data")
        while w.current("a") == first:
            await asyncio.sleep(0.01)
        assert w.current("a") == version_digest(tmp_path / "two")
        following.cancel()


@in_a_loop
async def test_a_url_is_polled_with_its_etag_and_only_read(engine, store, base, write_lora, monkeypatch) -> None:
    served = {"text": json.dumps({"adapters": [{"name": "a", "source": str(write_lora("one", 1.0))}]}), "asked": []}

    def answer(request: httpx.Request) -> httpx.Response:
        served["asked"].append(request.headers.get("if-none-match"))
        if served["asked"][-1] == "1":
            return httpx.Response(304)
        return httpx.Response(200, text=served["text"], headers={"etag": "1"})

    client = httpx.AsyncClient
    monkeypatch.setattr(
        "astra_serve.control.control.httpx.AsyncClient", lambda **_: client(transport=httpx.MockTransport(answer))
    )
    fleet = Fleet(engine, store, base, 2)
    reconciler = Reconciler(fleet, store)
    control = Control("https://example.org/adapters.yaml", fleet, reconciler)
    await control.refresh()
    assert (await reconciler.settled("a")).state == "serving"
    await control.refresh()
    assert served["asked"] == [None, "1"]
    with pytest.raises(Exception, match="change it there"):
        await control.publish("a", "x")


@in_a_loop
async def test_a_fixed_set_serves_all_of_it_or_does_not_start(world, write_lora) -> None:
    async with world() as w:
        good = {"name": "a", "source": str(write_lora("one", 1.0))}
        await w.reconciler.serve_all(document(good))
        assert w.current("a") is not None
        with pytest.raises(ServeError, match="adapter 'zero': the adapter changes nothing"):
            await w.reconciler.serve_all(document(good, {"name": "zero", "source": str(write_lora("zero", 0.0))}))


@pytest.mark.parametrize("state", ["fetching", "verifying", "loading", "probing", "serving"])
def test_a_server_killed_while_publishing_comes_back_with_what_the_document_says(
    engine, base, tiny_base, write_lora, tmp_path, state
) -> None:
    one, two = write_lora("one", 1.0), write_lora("two", 2.0)

    def publish(source: Path, until: str) -> int:
        words = [str(tmp_path), str(tiny_base), str(source), until]
        command = [sys.executable, "-m", "tests.astra_serve.control.killed_while_publishing", *words]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert publish(one, "never") == 0
    before = (tmp_path / "adapters.yaml").read_text()
    assert publish(two, state) == -signal.SIGKILL
    assert (tmp_path / "adapters.yaml").read_text() == before  # what was not proved to the end was never desired

    @in_a_loop
    async def restarted() -> None:
        store = Store(tmp_path / "store")
        fleet = Fleet(engine, store, base, 2)
        reconciler = Reconciler(fleet, store)
        control = Control(str(tmp_path / "adapters.yaml"), fleet, reconciler)
        await control.refresh()
        assert (await reconciler.settled("a")).state == "serving"
        assert fleet.aliases["a"].current.digest == version_digest(one)
        for version in (tmp_path / "store" / "versions").iterdir():
            store.verify(f"sha256:{version.name}")  # whole, or not there
        assert not list((tmp_path / "store" / "staging").iterdir())
        assert (await control.publish("a", str(two))).state == "serving"  # and it can be done again
        store.close()

    restarted()
