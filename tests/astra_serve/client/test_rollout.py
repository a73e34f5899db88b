"""A rollout over three replicas, each with a stand-in for the engine; tests/helm/test_replicas.py has real ones."""

import asyncio
import errno
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest

from astra_serve.adapters.store import Store
from astra_serve.client import AsyncClient, exchange, replicas
from astra_serve.client.replicas import Replica
from astra_serve.client.rollout import prepare, rollout
from astra_serve.control.status import Status
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Document
from astra_serve.errors import ServeError
from tests.astra_serve.gateway.test_gateway import say
from tests.astra_serve.stand_in import StandInEngine
from tests.astra_serve.world import TOKEN, World, in_a_loop, server


class Wire(httpx.AsyncBaseTransport):
    """The way to one replica, which can be cut after a request to `cut_after`, and tampered with."""

    def __init__(self, app: Any) -> None:
        self._inner = httpx.ASGITransport(app)
        self.cut_after: str | None = None
        self.cut = False
        self.sources: dict[str, str] = {}  # what this replica finds at a source

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.cut:
            raise httpx.ConnectError("All connection attempts failed")
        for source, mine in self.sources.items():
            if source.encode() in request.content:
                content = request.content.replace(source.encode(), mine.encode())
                headers = {**request.headers, "content-length": str(len(content))}
                request = httpx.Request(request.method, request.url, headers=headers, content=content)
        answer = await self._inner.handle_async_request(request)
        self.cut = self.cut_after is not None and self.cut_after in f"{request.method} {request.url.path}"
        return answer


class Three:
    """Three replicas over one document, the steps that they reported, and how to ask for a rollout."""

    def __init__(self, document: Path) -> None:
        self.document = document
        self.worlds: list[World] = []
        self.wires: list[Wire] = []
        self.replicas: list[Replica] = []
        self.steps: list[str] = []

    async def roll(self, name: str, source: Path | str, **more: Any) -> Adapter:
        wanted = {"source": str(source), **more.pop("wanted", {})}
        more = {"timeout_s": 600.0, **more}
        return await rollout(name, wanted, self.replicas, lambda step, _: self.steps.append(step), **more)

    async def prepare(self, name: str, source: Path | str, **wanted: Any) -> str:
        """Return the digest of a version that all replicas have proved."""
        version = await prepare(name, {"source": str(source), **wanted}, self.replicas, lambda *_: None, 600.0)
        return version.digest

    def served(self, name: str) -> list[str | None]:
        return [world.current(name) for world in self.worlds]

    def entry(self, name: str) -> Adapter | None:
        return desired.parse(self.document.read_text(), "").get(name)

    def write(self, *entries: Adapter) -> None:
        """Replace the document by hand, in one step."""
        document_text.edit(str(self.document), lambda _: desired.dump(Document(adapters=entries)))

    def stall(self, number: int) -> Callable[[], None]:
        """Let a replica never serve what it follows from now on, until the result is called."""
        reconciler = self.worlds[number].reconciler
        want = reconciler.want

        def stalled(entry: Adapter, **_: Any) -> None:
            reconciler.status[entry.name] = Status(entry, self.worlds[number].events, self.worlds[number].clock)

        reconciler.want = stalled
        return lambda: setattr(reconciler, "want", want)

    async def nothing_held(self) -> None:
        for world in self.worlds:
            await world.residency.idle()
            assert len(world.engine.loaded) == len(world.fleet.aliases)


@pytest.fixture
def three(base, tmp_path: Path, write_lora) -> Callable[..., Any]:
    """Replicas that serve `a`, and nothing else."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Three]:
        found = Three(tmp_path / "desired" / "adapters.yaml")
        found.document.parent.mkdir()
        found.write(Adapter(name="a", source=str(write_lora("one", 1.0))))
        async with AsyncExitStack() as stack:
            for number in range(3):
                store = Store(tmp_path / f"store{number}")
                stack.callback(store.close)
                world = await stack.enter_async_context(server(StandInEngine(4), store, base, found.document, 4))
                wire = Wire(world.admin_app)
                client = AsyncClient(f"http://r{number}", TOKEN, transport=wire)
                found.worlds.append(world)
                found.wires.append(wire)
                found.replicas.append(Replica(await stack.enter_async_context(client)))
                await world.control.refresh()
                await world.settled("a")
            yield found

    return make


@pytest.fixture
def slow_store(monkeypatch) -> None:
    """Writing the document takes a while."""

    def slow(*written: Any) -> None:
        time.sleep(0.3)
        write(*written)

    write = document_text._write
    monkeypatch.setattr(document_text, "_write", slow)


@in_a_loop
async def test_a_version_is_proved_everywhere_before_any_replica_serves_it(three, write_lora) -> None:
    async with three() as t:
        (old,) = set(t.served("a"))
        entry = await t.roll("a", write_lora("two", 2.0), wanted={"required": True})
        assert t.steps == ["prepare", "prepare", "prepare", "verify", "flip", "serve", "serve", "serve"]
        assert t.served("a") == [entry.digest] * 3
        assert entry == t.entry("a")
        (step,) = entry.steps
        assert (step.digest, Path(step.source).name) == (old, "one")
        assert entry.required
        assert (await replicas.status(t.replicas)).drift == ()
        await t.nothing_held()


@in_a_loop
async def test_a_name_that_is_new_is_served_everywhere(three, write_lora) -> None:
    async with three() as t:
        entry = await t.roll("b", write_lora("two", 2.0))
        assert t.served("b") == [entry.digest] * 3
        assert entry.previous == []


@in_a_loop
async def test_a_version_that_one_replica_cannot_prove_is_served_by_none(three, write_lora) -> None:
    async with three() as t:
        before, text = t.served("a"), t.document.read_text()
        t.worlds[1].engine.refuse.add("a@")
        with pytest.raises(ServeError, match=r"r1: 'a' was not prepared: .*it said no.*; nothing was changed$"):
            await t.roll("a", write_lora("two", 2.0))
        assert t.served("a") == before
        assert t.document.read_text() == text
        assert "flip" not in t.steps
        await t.nothing_held()


@in_a_loop
async def test_replicas_that_find_different_bytes_at_the_source_serve_neither(three, write_lora) -> None:
    async with three() as t:
        before, source = t.served("a"), write_lora("two", 2.0)
        t.wires[2].sources[str(source)] = str(write_lora("three", 3.0))
        with pytest.raises(ServeError, match="is not the same everywhere"):
            await t.roll("a", source)
        assert t.served("a") == before
        await t.nothing_held()


@in_a_loop
async def test_the_others_restore_when_a_replica_is_gone_after_it_prepared(three, write_lora) -> None:
    async with three() as t:
        old = t.served("a")[0]
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(
            ServeError,
            match=r"r1 does not answer.*do not serve the version before yet: http://r1$",
        ):
            await t.roll("a", write_lora("two", 2.0))
        assert t.steps.count("flip") == t.steps.count("restore") == 1
        assert t.served("a") == [old] * 3
        assert t.entry("a").digest == old  # and not whatever the source holds by now


@in_a_loop
async def test_the_restored_version_is_the_served_one_even_if_its_source_has_changed(three, write_lora) -> None:
    """The document named `a` by its folder alone; after a rollout that failed it must not serve what is there now."""
    async with three() as t:
        old = t.served("a")[0]
        (Path(t.entry("a").source) / "adapter_model.safetensors").write_bytes(b"something else")
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(ServeError):
            await t.roll("a", write_lora("two", 2.0))
        assert t.served("a") == [old] * 3
        assert [world.reconciler.status["a"].phase for world in t.worlds] == ["serving"] * 3


@in_a_loop
async def test_a_new_name_is_removed_when_its_rollout_is_restored(three, write_lora) -> None:
    async with three() as t:
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(ServeError, match="r1 does not answer"):
            await t.roll("b", write_lora("two", 2.0))
        assert t.entry("b") is None
        assert [t.served("b")[0], t.served("b")[2]] == [None, None]


@in_a_loop
async def test_a_replica_that_is_too_slow_to_serve_restores_all(three, write_lora, monkeypatch) -> None:
    monkeypatch.setattr("astra_serve.client.rollout.RESTORE_S", 1.0)
    async with three() as t:
        old = t.served("a")[0]
        t.stall(2)
        late = "these replicas do not serve the version before yet: http://r2"
        reason = f"^http://r2 does not serve it within 1 s; the document's entry is restored; {late}$"
        with pytest.raises(ServeError, match=reason):
            await t.roll("a", write_lora("two", 2.0), timeout_s=1.0)
        assert t.served("a") == [old] * 3
        assert t.entry("a").digest == old


@in_a_loop
async def test_an_interrupted_rollout_restores_the_version_before(three, write_lora) -> None:
    async with three() as t:
        old = t.served("a")[0]
        resume = t.stall(2)
        rolling = asyncio.create_task(t.roll("a", write_lora("two", 2.0)))
        while t.served("a")[0] == old:
            await asyncio.sleep(0.01)
        resume()
        rolling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rolling
        assert t.entry("a").digest == old
        assert t.served("a") == [old] * 3


@in_a_loop
async def test_a_document_that_is_emptied_meanwhile_is_not_written_over(three, write_lora) -> None:
    """The one entry of a new name would be all that is left."""

    class Meddler(StandInEngine):
        async def load(self, name: str, folder: Path) -> str:
            t.document.write_text("")
            return await super().load(name, folder)

    async with three() as t:
        t.worlds[0].engine.__class__ = Meddler
        with pytest.raises(ServeError, match="is empty or gone meanwhile"):
            await t.roll("b", write_lora("two", 2.0))
        assert t.document.read_text() == ""
        assert all(t.served("a"))


@in_a_loop
async def test_the_first_adapter_of_an_empty_document_is_removed_when_it_is_restored(three, write_lora) -> None:
    async with three() as t:
        t.document.write_text("adapters: []")
        for replica in t.replicas:
            await replica.client.refresh()
        t.document.write_text("")
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(
            ServeError, match=r"is restored; these replicas do not serve the version before yet: http://r1$"
        ):
            await t.roll("b", write_lora("two", 2.0))
        assert desired.parse(t.document.read_text(), "") == Document()
        assert t.document.read_text().strip()
        assert [t.served("b")[0], t.served("b")[2]] == [None, None]
        assert not t.worlds[0].control.state.fault


@in_a_loop
async def test_a_replica_that_failed_before_does_not_change_the_restored_version(three, write_lora) -> None:
    """The document names a folder, with other bytes by now; one replica never had the ones before."""
    async with three() as t:
        old = t.served("a")[0]
        t.worlds[1].reconciler.remove("a")
        t.worlds[1].reconciler.want(Adapter(name="a", source="/not/there"))
        await t.worlds[1].settled("a")
        (Path(t.entry("a").source) / "adapter_model.safetensors").write_bytes(b"something else")
        t.wires[2].cut_after = "PUT /prepared"
        with pytest.raises(ServeError, match="r2 does not answer"):
            await t.roll("a", write_lora("two", 2.0))
        assert t.entry("a").digest == old
        assert t.served("a")[0] == old


@in_a_loop
async def test_a_replica_that_is_gone_after_the_flip_restores_before_the_slowest_is_done(three, write_lora) -> None:
    async with three() as t:
        resume = t.stall(2)
        t.wires[1].cut_after = "PUT /prepared"
        rolling = asyncio.create_task(t.roll("b", write_lora("two", 2.0)))
        async with asyncio.timeout(20):
            while "restore" not in t.steps:
                await asyncio.sleep(0.01)
            resume()
            with pytest.raises(ServeError, match="r1 does not answer"):
                await rolling


@in_a_loop
async def test_a_rollout_restores_only_its_own_change(three, write_lora) -> None:
    """Two of the same version: the second finds everything as it wants it, and then loses a replica."""
    async with three() as t:
        source = write_lora("two", 2.0)
        entry = desired.entry({
            "name": "a", "source": str(source), "previous": [t.served("a")[0]],
            "digest": await t.prepare("a", source),
        })  # fmt: skip

        class Other(StandInEngine):
            async def load(self, name: str, folder: Path) -> str:
                t.write(entry)
                return await super().load(name, folder)

        t.worlds[0].engine.__class__ = Other
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(ServeError, match=r"^http://r1 does not answer: All connection attempts failed$"):
            await t.roll("a", source)
        assert t.entry("a") == entry


@in_a_loop
async def test_a_document_that_changes_right_before_a_rollout_is_read_again(three, write_lora) -> None:
    async with three() as t:
        control, source = t.worlds[2].control, write_lora("three", 3.0)
        refresh = control.refresh

        async def change() -> None:
            await refresh()
            if not reads:
                t.write(t.entry("a"), Adapter(name="c", source=str(source)))
            reads.append(1)

        reads: list[int] = []
        control.refresh = change
        entry = await t.roll("b", write_lora("two", 2.0))
        assert t.served("b") == [entry.digest] * 3
        assert t.entry("c") is not None


@in_a_loop
async def test_a_permission_to_change_nothing_does_not_outlast_its_rollout(three, write_lora) -> None:
    async with three() as t:
        source = write_lora("zero", 0.0)
        wanted = {"source": str(source), "allow_no_effect": True}
        await prepare("b", wanted, t.replicas, lambda *_: None, 600.0)
        with pytest.raises(ServeError, match="changes nothing"):
            await t.roll("b", source)
        assert t.entry("b") is None


@in_a_loop
async def test_a_server_that_is_no_admin_port_or_silent_is_one_line_in_time(three) -> None:
    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await say(send, {})

    async with three():
        other = Replica(AsyncClient("http://other", TOKEN, transport=httpx.ASGITransport(answer)))
        for work in (
            rollout("a", {"source": "x"}, [other], lambda *_: None, 600.0),
            prepare("a", {"source": "x"}, [other], lambda *_: None, 600.0),
        ):
            with pytest.raises(ServeError, match="other does not answer as an admin port of this version"):
                await work
        (line,) = (await replicas.status([other])).drift
        assert line.startswith("http://other does not answer as an admin port")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        async with replicas.connect([f"http://127.0.0.1:{silent.getsockname()[1]}"], TOKEN, 0.2) as found:
            assert "does not answer" in (await replicas.status(found)).drift[0]
        assert time.monotonic() - began < 10


@in_a_loop
async def test_a_version_that_is_prepared_under_several_names_at_once_is_stored_once(three, write_lora) -> None:
    async with three() as t:
        world, source = t.worlds[0], str(write_lora("two", 2.0))
        for _ in range(10):
            entries = [Adapter(name=name, source=source) for name in "wxyz"]
            found = await asyncio.gather(*(world.control.prepare(entry) for entry in entries))
            assert len({version.digest for version in found}) == 1
            world.store.discard(found[0].digest)


@pytest.mark.parametrize("source", ["~nosuchuser/x", "a\0b", "a" * 5000, "::", "s3::x://y", "/"])
@in_a_loop
async def test_an_impossible_source_is_one_line_and_no_fault_of_the_server(three, source: str) -> None:
    async with three() as t:
        answer = await t.worlds[0].api.put("/prepared/a", json={"source": source})
        reason = answer.json()["error"]["message"]
        assert (answer.status_code, len(reason.splitlines())) == (422, 1)
        assert reason.startswith("'a' was not prepared: ")


@in_a_loop
async def test_canaries_that_differ_are_drift(three, write_lora) -> None:
    async with three() as t:
        base, canary = t.entry("a"), write_lora("canary", 2.0)
        for world, value in zip(t.worlds, (2.0, 3.0, 2.0), strict=True):
            shutil.rmtree(canary)
            write_lora("canary", value)
            entry = base.model_copy(update={"canary": desired.Canary(version=str(canary), weight=0.5)})
            t.write(entry)
            await world.control.refresh()
            await world.settled("a")
        (line,) = (await replicas.status(t.replicas)).drift
        assert line.startswith("the canary of a differs: a@")
        assert "at http://r0, http://r2; a@" in line


@in_a_loop
async def test_an_entry_that_others_wrote_meanwhile_stays(three, write_lora) -> None:
    async with three() as t:
        theirs = Adapter(name="a", source=str(write_lora("theirs", 4.0)))

        class Meddler(StandInEngine):
            async def load(self, name: str, folder: Path) -> str:
                t.write(theirs)
                return await super().load(name, folder)

        t.worlds[0].engine.__class__ = Meddler
        with pytest.raises(ServeError, match="somebody else has changed 'a'"):
            await t.roll("a", write_lora("two", 2.0))
        assert t.entry("a") == theirs


@in_a_loop
async def test_no_rollout_begins_while_a_replica_is_gone_or_follows_another_document(
    three, write_lora, tmp_path
) -> None:
    async with three() as t:
        source = write_lora("two", 2.0)
        other = tmp_path / "other.yaml"
        other.write_text("adapters: []")
        with pytest.raises(ServeError, match="does not follow the text at"):
            await t.roll("a", source, where=str(other))
        with pytest.raises(ServeError, match="not there as seen from here: give --document"):
            await t.roll("a", source, where=str(tmp_path / "none.yaml"))
        with pytest.raises(
            ServeError, match=r"https://example.org/a.yaml can only be read from here: .*`prepare` first"
        ):
            await t.roll("a", source, where="https://example.org/a.yaml")
        t.wires[0].cut = True
        with pytest.raises(ServeError, match="r0 does not answer"):
            await t.roll("a", source)
        t.wires[0].cut = False
        t.document.write_text("adapters: [{name: a}]")
        await t.worlds[2].control.refresh()
        with pytest.raises(ServeError, match="r2 does not follow the document as it is now"):
            await t.roll("a", source)
        assert t.steps == []


@in_a_loop
async def test_a_prepared_version_has_no_place_and_no_request_reaches_it(three, write_lora) -> None:
    async with three() as t:
        digest = await t.prepare("b", write_lora("two", 2.0))
        assert t.served("b") == [None] * 3
        assert await t.replicas[0].adapter("b") is None
        assert t.worlds[0].fleet.resolve(f"b@{digest[7:19]}") is None
        await t.nothing_held()


@in_a_loop
async def test_preparing_the_serving_version_changes_nothing(three, write_lora) -> None:
    async with three() as t:
        source = write_lora("two", 2.0)
        await t.roll("a", source, wanted={"pin": True})
        await t.prepare("a", source)
        assert [world.fleet.aliases["a"].pinned for world in t.worlds] == [True] * 3
        entry = await t.roll("a", write_lora("three", 3.0))
        assert entry.pin  # as before: it was not said otherwise


@in_a_loop
async def test_a_restored_document_has_the_bytes_of_before(three, write_lora) -> None:
    async with three() as t:
        (old,) = set(t.served("a"))
        t.document.write_text(f"# ours\nadapters:\n- name: a  # the first\n  source: {old}\n  digest: {old}\n")
        text = t.document.read_text()
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(ServeError, match="r1 does not answer"):
            await t.roll("a", write_lora("two", 2.0))
        assert "restore" in t.steps
        assert t.document.read_text() == text
        t.wires[1].cut_after, t.wires[1].cut = None, False
        await t.replicas[1].client.refresh()
        assert t.served("a") == [old] * 3
        await t.nothing_held()


@in_a_loop
async def test_an_entry_that_failed_before_a_rollout_is_restored_as_it_was(three, write_lora, tmp_path) -> None:
    """The version that serves then is not the document's, and must not replace it there."""
    async with three() as t:
        later = Adapter(name="a", source=str(tmp_path / "later"), digest="sha256:" + 64 * "d")
        t.write(later)
        for world in t.worlds:
            await world.control.refresh()
            assert (await world.settled("a")).phase == "failed"
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(ServeError, match="r1 does not answer"):
            await t.roll("a", write_lora("two", 2.0))
        assert t.entry("a") == later


@pytest.mark.usefixtures("slow_store")
@in_a_loop
async def test_rollouts_of_two_names_at_once_lose_neither(three, write_lora) -> None:
    async with three() as t:
        await asyncio.gather(t.roll("b", write_lora("two", 2.0)), t.roll("c", write_lora("three", 3.0)))
        assert all(t.served("b"))
        assert all(t.served("c"))


@pytest.mark.parametrize("step", ["_locked", "_write"])
@in_a_loop
async def test_a_store_that_fails_for_a_moment_does_not_prevent_the_restoration(
    three, write_lora, monkeypatch, step: str
) -> None:
    def failing(*arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) == 2:  # the first is the flip
            raise OSError(errno.ESTALE, "Stale file handle")
        return works(*arguments)

    works, tries = getattr(document_text, step), list[Any]()
    async with three() as t:
        monkeypatch.setattr(document_text, step, failing)
        (old,) = set(t.served("a"))
        t.wires[1].cut_after = "PUT /prepared"
        with pytest.raises(ServeError, match="entry is restored"):
            await t.roll("a", write_lora("two", 2.0))
        assert len(tries) == 3
        assert t.entry("a").digest == old


@pytest.mark.usefixtures("slow_store")
@in_a_loop
async def test_a_second_signal_does_not_prevent_the_restoration(three, write_lora) -> None:
    async with three() as t:
        text = t.document.read_text()
        rolling = asyncio.create_task(t.roll("a", write_lora("two", 2.0)))
        while "verify" not in t.steps:
            await asyncio.sleep(0.01)
        for _ in range(10):  # while it writes, and while it puts back
            await asyncio.sleep(0.1)
            rolling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rolling
        assert t.entry("a").source == desired.parse(text, "").get("a").source
        assert len(set(t.served("a"))) == 1


@in_a_loop
async def test_status_lists_every_difference_between_replicas(three, write_lora) -> None:
    async with three() as t:
        assert (await replicas.status(t.replicas)).drift == ()
        (old,) = set(t.served("a"))
        assert (await replicas.status(t.replicas, {"a": old})).drift == ()
        first, second, third = (world.control for world in t.worlds)
        unread = second.refresh, third.refresh
        second.refresh = third.refresh = lambda: asyncio.sleep(0)  # they do not read it
        t.write(Adapter(name="a", source=str(write_lora("two", 2.0))))
        assert "r0: a is " in "".join((await replicas.status(t.replicas)).drift)  # it has looked, and is on its way
        await first.reconciler.outcome("a")
        state = await replicas.status(t.replicas, {"a": old})
        assert [line.partition(" ")[0] for line in state.drift] == ["the", "a", "http://r0:"]
        assert "http://r1, http://r2" in state.drift[1]
        assert state.drift[2] == f"http://r0: a is not {old} yet"
        second.refresh, third.refresh = unread
        t.worlds[1].engine.refuse.add("a@")
        await second.refresh()
        await second.reconciler.outcome("a")
        t.wires[2].cut = True
        drift = "\n".join((await replicas.status(t.replicas)).drift)
        assert "r1: a is failed, serves a@" in drift
        assert "it said no" in drift
        assert "r2 does not answer" in drift
        json.dumps(asdict(state))


def test_a_name_with_several_addresses_is_several_replicas(monkeypatch) -> None:
    def found(host: str, port: int, type: int) -> list[Any]:
        four = [(socket.AF_INET, type, 6, "", (f"10.0.0.{n}", port)) for n in (2, 1)]
        six = [(socket.AF_INET6, type, 6, "", (f"fd00::{n}", port, 0, 0)) for n in (1, 2)]
        if host == "none":
            raise socket.gaierror(-2, "Name or service not known")
        return four[:1] + six[:1] if host == "one" else six + four

    monkeypatch.setattr(socket, "getaddrinfo", found)

    async def names(*urls: str) -> list[str]:
        async with replicas.connect(urls, TOKEN) as there:
            return [replica.name for replica in there]

    assert asyncio.run(names("http://all:8001")) == ["http://10.0.0.1:8001", "http://10.0.0.2:8001"]
    assert asyncio.run(names("http://one:8001", "http://one:8001/")) == ["http://one:8001"]
    assert asyncio.run(names("https://one:8001")) == ["https://one:8001"]
    with pytest.raises(ServeError, match="https://all:8001 has 2 addresses, and its certificate is the name's"):
        asyncio.run(names("https://all:8001"))
    assert asyncio.run(names("http://127.0.0.1:1", "http://127.0.0.2:1")) == [
        "http://127.0.0.1:1",
        "http://127.0.0.2:1",
    ]
    with pytest.raises(ServeError, match="http://none:8001: Name or service not known"):
        asyncio.run(names("http://none:8001"))
    with pytest.raises(ServeError, match="is no URL of an admin port"):
        asyncio.run(names("127.0.0.1:8001"))
    with pytest.raises(ServeError, match="is no URL: Invalid port"):
        asyncio.run(names("http://127.0.0.1:80x"))
    with pytest.raises(ServeError, match="there is no URL"):
        asyncio.run(names())


@pytest.mark.parametrize("url", ["http://a..b:1", f"http://{'a' * 64}:1", "http://xn--:1", "http://[::1:1", "http://"])
def test_an_impossible_host_is_one_line(url: str) -> None:
    with pytest.raises(ServeError) as caught:
        replicas._each(url)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "url", ["http://a:hunter2@h:1", "http://a:hun@ter2@h:1", "http://h:1?token=hunter2", "a:hunter2@h"]
)
def test_a_url_with_a_possible_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ServeError, match="the token comes from the environment") as caught:
        exchange.admin_url(url)
    assert "ter2" not in str(caught.value)
