"""The document is followed, wherever it is, and a fault in it changes nothing."""

import asyncio
import gzip
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import s3fs

from astra_serve.adapters.version_files import version_digest
from astra_serve.control.desired_state import DesiredState
from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Document
from tests.astra_serve.world import World, in_a_loop, running, server


def text(**sources: Path) -> str:
    return desired.dump(Document(adapters=[Adapter(name=name, source=str(source)) for name, source in sources.items()]))


@asynccontextmanager
async def followed(w: World) -> AsyncIterator[None]:
    async with running(w.control):
        yield


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@in_a_loop
async def test_a_file_is_followed_as_it_changes_and_a_fault_in_it_changes_nothing(world, write_lora) -> None:
    async with world() as w, followed(w):
        w.file.write_text(text(a=write_lora("one", 1.0)))
        await until(lambda: w.current("a"))
        first = w.current("a")
        w.file.write_text("adapters: [{name: a}]")
        await until(lambda: w.control.state.fault)
        assert "adapters.0.source: Field required" in w.control.state.fault
        assert (w.current("a"), w.seen("")) == (first, ["document_failed"])
        w.file.write_text(text(a=write_lora("two", 2.0)))
        await until(lambda: w.current("a") != first)
        assert (await w.api.get("/adapters")).json()["document"]["fault"] is None


@in_a_loop
async def test_a_file_is_read_again_every_5_s_where_its_changes_are_not_reported(
    world, write_lora, monkeypatch
) -> None:
    async def no_reports(*_: Any, **__: Any) -> AsyncIterator[Any]:
        raise OSError("OS file watch limit reached")
        yield

    monkeypatch.setattr("astra_serve.control.followed.awatch", no_reports)
    async with world() as w:
        began, times, read = w.clock.now(), [], w.control.state.read

        async def timed() -> bool:
            times.append(w.clock.now() - began)
            return await read()

        monkeypatch.setattr(w.control.state, "read", timed)
        async with followed(w):
            await until(w.clock.waited_for)
            w.file.write_text(text(a=write_lora("one", 1.0)))
            await w.clock.advance(4.9)
            assert times == [0]
            await w.clock.advance(0.1)
            await until(lambda: w.current("a"))
            assert times == [0, 5]


@in_a_loop
async def test_a_file_is_followed_in_a_folder_that_is_not_there_at_first(
    engine, store, base, write_lora, tmp_path
) -> None:
    async with server(engine, store, base, tmp_path / "not" / "yet" / "adapters.yaml") as w, followed(w):
        await until(w.file.parent.is_dir)
        one = text(a=write_lora("one", 1.0))
        await until(lambda: w.file.write_text(one) and w.current("a"))  # the first may come before the watch


@in_a_loop
async def test_a_config_map_is_followed_through_its_links(world, write_lora, tmp_path) -> None:
    """Kubernetes mounts adapters.yaml -> ..data/adapters.yaml, and swaps the link ..data."""
    async with world() as w:
        for number, source in enumerate((write_lora("one", 1.0), write_lora("two", 2.0))):
            (tmp_path / f"..{number}").mkdir()
            (tmp_path / f"..{number}" / "adapters.yaml").write_text(text(a=source))
        (tmp_path / "..data").symlink_to("..0")
        w.file.symlink_to("..data/adapters.yaml")
        async with followed(w):
            await until(lambda: w.current("a"))
            (tmp_path / "new").symlink_to("..1")
            (tmp_path / "new").replace(tmp_path / "..data")
            await until(lambda: w.current("a") == version_digest(tmp_path / "two"))


@in_a_loop
async def test_a_document_that_is_gone_or_empty_changes_nothing(world, write_lora) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        for spoil in (lambda f: f.write_text(""), lambda f: f.write_bytes(b"\xff"), lambda f: f.unlink()):
            spoil(w.file)
            await w.control.refresh()
            assert w.control.state.fault
            assert w.current("a") is not None
        await w.follow("adapters: []")
        assert w.control.state.fault is None
        assert w.current("a") is None


@in_a_loop
async def test_a_server_is_not_ready_before_its_document_was_read(world) -> None:
    async with world() as w:
        assert "has not been read: not yet" in w.control.not_ready()[0]
        await w.follow("adapters: 3")
        assert "adapters" in w.control.not_ready()[0]
        await w.follow("adapters: []")
        assert w.control.not_ready() == []


@in_a_loop
async def test_required_adapters_of_the_first_document_gate_readiness_and_later_ones_do_not(world, write_lora) -> None:
    good = {"name": "good", "source": str(write_lora("good", 1.0)), "required": True}
    bad = {"name": "bad", "source": "/not/there", "required": True}
    optional = {"name": "optional", "source": "/not/there"}

    def document(*entries: dict[str, Any]) -> str:
        return json.dumps({"adapters": entries})

    async with world() as w:
        await w.follow(document(good, bad, optional))
        assert w.control.not_ready() == ["good: pending", "bad: pending"]
        assert (await w.settled("good")).phase == "serving"
        assert (await w.settled("bad")).phase == "failed"
        assert w.control.not_ready() == ["bad: failed"]
        await w.follow(document(good, {**bad, "required": False}, optional))
        assert w.control.not_ready() == []
        await w.follow(document(good, bad))
        assert (await w.settled("bad")).phase == "failed"
        assert w.control.not_ready() == []  # all replicas read this


class Page(BaseHTTPRequestHandler):
    """A document with an ETag."""

    text, asked = "", list[str | None]()

    def do_GET(self) -> None:
        self.asked.append(self.headers["If-None-Match"])
        known = self.asked[-1] == '"1"'
        self.send_response(304 if known else 200)
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(b"" if known else self.text.encode())

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@in_a_loop
async def test_a_page_is_read_again_with_its_etag_and_never_written(engine, store, base, write_lora) -> None:
    Page.text, Page.asked = text(a=write_lora("one", 1.0)), []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = Thread(target=http.serve_forever)
    thread.start()
    try:
        async with server(engine, store, base, f"http://127.0.0.1:{http.server_port}/adapters.yaml") as w:
            await w.control.refresh()
            assert (await w.settled("a")).phase == "serving"
            await w.control.refresh()
            assert Page.asked == [None, '"1"']
            answer = await w.api.put("/adapters/a", json={"source": "x"})
            assert (answer.status_code, "change it there" in answer.text) == (409, True)
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@contextmanager
def page(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the URL of a document behind HTTP."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/adapters.yaml"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class Bomb(BaseHTTPRequestHandler):
    """70 MiB of spaces, as 70 KiB of gzip."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(gzip.compress(b" " * (70 << 20), compresslevel=1))

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@in_a_loop
async def test_a_page_is_read_up_to_64_mib_after_decompression() -> None:
    with page(Bomb) as url:
        state = DesiredState(url)
        assert not await state.read()
        assert state.fault == f"{url} is larger than 64 MiB, the limit for a document"


class Endless(Bomb):
    """A comment without an end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(ConnectionError):
            while True:
                self.wfile.write(b"# ")
                time.sleep(0.01)


@in_a_loop
async def test_a_page_that_does_not_end_is_given_up() -> None:
    with page(Endless) as url:
        state = DesiredState(url, page_s=0.1)
        assert not await state.read()
        assert state.fault == "TimeoutError"


@pytest.mark.parametrize("text", ["adapters: [{name: a}]", "[" * 25_000, "{}", "adapters: []\nadapters: []"])
@in_a_loop
async def test_a_text_is_parsed_once_even_with_a_fault(text: str, tmp_path: Path, monkeypatch) -> None:
    """Another thread parses it; the loop stays free."""
    threads, parse = [], desired.parse

    def parsed(text: str, origin: str) -> Document:
        threads.append(threading.current_thread())
        return parse(text, origin)

    monkeypatch.setattr(desired, "parse", parsed)
    state = DesiredState(str(tmp_path / "adapters.yaml"))
    for wanted, count in ((text, 1), ("adapters: []", 2)):
        (tmp_path / "adapters.yaml").write_text(wanted)
        faults = set()
        for _ in range(3):
            await state.read()
            faults.add(state.fault)
        assert len(threads) == count
        assert (faults == {None}) == (wanted == "adapters: []")
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("text", ["# adapters: []\n", "null", "{}", "adapters: []\nadapters: []"])
@in_a_loop
async def test_a_document_without_adapters_serves_on_and_is_not_edited(world, write_lora, text: str) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        await w.follow(text)
        assert w.control.state.fault
        assert w.current("a")
        answer = await w.api.put("/adapters/a", json={"source": str(write_lora("two", 2.0))})
        assert answer.status_code == 400
        assert w.file.read_text() == text


@in_a_loop
async def test_a_document_in_an_object_store_is_followed(bucket, engine, store, base, write_lora) -> None:
    async with server(engine, store, base, f"{bucket}/adapters.yaml") as w:
        for name, value in (("a", 1.0), ("b", 2.0)):
            content = text(**{name: write_lora(name, value)}).encode()
            await asyncio.to_thread(s3fs.S3FileSystem().pipe, "adapters/adapters.yaml", content)
            await w.control.refresh()
            assert w.control.state.fault is None
            assert (await w.settled(name)).phase == "serving"
        assert set(w.fleet.aliases) == {"b"}


def test_a_steps_time_may_be_in_any_zone() -> None:
    step = desired.Step.model_validate({"digest": "sha256:" + 64 * "a", "replaced": "2026-11-27T10:00:00+01:00"})
    assert pytest.approx(step.replaced.timestamp()) == 1795770000
