"""Web servers that fail, lie about the size, send without an end or not at all; over real HTTP."""

import asyncio
import errno
import gzip
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from astra_serve.adapters import download
from astra_serve.adapters.fetch import Sources, fetch, origin
from astra_serve.adapters.progress import FetchLimits
from astra_serve.adapters.store import Store
from astra_serve.adapters.version_files import version_digest
from astra_serve.errors import CannotFetch, CannotStore
from converter.adapter_dir import MalformedAdapter
from tests.astra_serve.world import in_a_loop

WEIGHTS = "adapter_model.safetensors"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A web server: `files` by name, and `answers` that come before them, one for each request."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, list[int | Answer]] = {}
        self.end = Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                answer: int | Answer = 200 if name in web.files else 404
                if web.answers.get(name):
                    answer = web.answers[name].pop(0)
                with suppress(ConnectionError):
                    if callable(answer):
                        answer(self)
                        return
                    self.send_response(answer)
                    content = web.files[name] if answer == 200 else b"no"
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/adapter"


@pytest.fixture
def web(write_lora) -> Iterator[Web]:
    found = Web()
    found.files = {path.name: path.read_bytes() for path in write_lora("source", 1.0).iterdir()}
    thread = Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.end.set()
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def fetched(source: str, store: Store, **limits: Any) -> Path:
    return asyncio.run(fetch(source, store, (), Sources(FetchLimits(**limits))))


def refused(source: str, store: Store, error: type[Exception], **limits: Any) -> str:
    """Return the one line of a download that fails, and leaves nothing."""
    with pytest.raises(error) as caught:
        fetched(source, store, **limits)
    (line,) = str(caught.value).splitlines()
    assert not list(store.staging().parent.glob("*/*"))
    return line


@pytest.mark.parametrize("status", [503, 500, 403])
def test_an_error_on_the_record_fails_the_download(web: Web, store: Store, status: int) -> None:
    """Otherwise an adapter of another base would be served, without its probe."""
    web.answers["astra.json"] = [status]
    assert f"{web.url} cannot be fetched: astra.json: the answer is {status}" in refused(web.url, store, CannotFetch)
    assert (fetched(web.url, store) / "astra.json").read_bytes() == web.files["astra.json"]


def test_a_connection_that_breaks_on_the_record_fails_the_download(web: Web, store: Store) -> None:
    web.answers["astra.json"] = 3 * [lambda handler: handler.connection.close()]
    assert "cannot be fetched: astra.json: " in refused(web.url, store, CannotFetch)


@pytest.mark.parametrize("status", [404, 410])
def test_an_adapter_without_a_record_is_one_whose_source_says_so(web: Web, store: Store, status: int) -> None:
    web.answers["astra.json"] = [status]
    assert sorted(path.name for path in fetched(web.url, store).iterdir()) == ["adapter_config.json", WEIGHTS]


def test_a_template_and_defaults_are_fetched_and_may_be_absent_or_denied(web: Web, store: Store) -> None:
    web.files["chat_template.jinja"] = b"{{ messages }}"
    web.answers["generation_config.json"] = [403]  # as S3 says of a missing file where the bucket may not be listed
    names = sorted(path.name for path in fetched(web.url, store).iterdir())
    assert names == ["adapter_config.json", WEIGHTS, "astra.json", "chat_template.jinja"]


def test_a_template_that_is_too_large_or_cannot_be_read_fails_the_fetch(web: Web, store: Store) -> None:
    web.answers["chat_template.jinja"] = [500]
    assert "cannot be fetched: chat_template.jinja: " in refused(web.url, store, CannotFetch)
    web.answers.clear()
    web.files["chat_template.jinja"] = bytes(2**20 + 1)
    assert "chat_template.jinja has more than 1 MiB" in refused(web.url, store, MalformedAdapter)


def test_a_missing_file_is_named(web: Web, store: Store) -> None:
    web.answers[WEIGHTS] = [404]
    assert refused(web.url, store, CannotFetch).endswith(f"cannot be fetched: it has no {WEIGHTS}")


def test_a_redirect_is_followed(web: Web, store: Store) -> None:
    def moved(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"/elsewhere/{WEIGHTS}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    web.answers[WEIGHTS] = [moved]
    assert (fetched(web.url, store) / WEIGHTS).read_bytes() == web.files[WEIGHTS]


def sending(headers: dict[str, str], blocks: Callable[[], Iterator[bytes]]) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        for block in blocks():
            handler.wfile.write(block)

    return answer


def endless() -> Iterator[bytes]:
    while True:
        yield bytes(1 << 20)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (WEIGHTS, sending({"Content-Length": str(2**40)}, endless)),
        (WEIGHTS, sending({}, endless)),
        (WEIGHTS, sending({"Content-Encoding": "gzip"}, lambda: iter([gzip.compress(bytes(64 << 20), 1)]))),
        ("astra.json", sending({}, endless)),
    ],
    ids=["announced", "endless", "gzip", "record"],
)
def test_a_file_that_is_too_large_is_not_read(web: Web, store: Store, name: str, answer: Answer) -> None:
    web.answers[name] = [answer]
    line = refused(web.url, store, MalformedAdapter, max_bytes=20 << 20)
    most = 20 if name == WEIGHTS else 16
    assert line.endswith(f"cannot be fetched: {name} has more than {most} MiB, the limit for an adapter of this base")


def silence(web: Web, before: bytes) -> Iterator[bytes]:
    yield before
    web.end.wait()


def test_a_source_that_stops_sending_is_given_up(web: Web, store: Store) -> None:
    web.answers[WEIGHTS] = [sending({"Content-Length": "1000"}, lambda: silence(web, b"start"))]
    assert refused(web.url, store, CannotFetch, stall_s=1).endswith("cannot be fetched: it has sent nothing for 1 s")


def drops(web: Web) -> Iterator[bytes]:
    while not web.end.wait(0.05):
        yield b"x"


def test_a_source_that_sends_too_slowly_is_given_up(web: Web, store: Store) -> None:
    web.answers[WEIGHTS] = [sending({}, lambda: drops(web))]
    line = refused(web.url, store, CannotFetch, window_s=1)
    assert line.endswith("it has sent less than 64 KiB/s for 1 s")


@in_a_loop
async def test_silent_sources_delay_neither_local_folders_nor_sources_elsewhere(
    web: Web, store: Store, write_lora
) -> None:
    sources = Sources(FetchLimits(downloads=4, threads=4, share=3, look_s=60))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/adapter"
        hung: list[asyncio.Task[Any]] = []
        for number in range(20):
            hung.append(asyncio.create_task(fetch(f"{url}{number}", store, (), sources)))
            hung.append(asyncio.create_task(sources.fingerprint(f"{url}{number}")))
        await asyncio.sleep(0)
        local = write_lora("local", 2.0)
        assert await fetch(str(local), store, (), sources) == local
        assert len(await sources.fingerprint(str(local))) == 3
        assert version_digest(await fetch(web.url, store, (), sources))
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)


def test_the_origin_of_a_source_is_its_host_or_its_mount() -> None:
    assert origin("https://user:secret@host:8443/a/b?token=x") == "https://host:8443"
    assert origin("s3://bucket/key") == "s3://bucket"
    assert origin("hf://org/a") == origin("hf://other/b") == "hf://"
    assert origin("/proc/self") == "/proc"
    assert origin("file:///proc/self") == "/proc"
    assert origin("./here") == origin(str(Path("here").absolute()))
    assert origin("http://[") == "http://["


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("x"), (1, "it has no astra.json")),
        (PermissionError("Forbidden"), (1, "astra.json: access is denied")),
        (OSError(errno.ENOSPC, "No space left on device"), (errno.ENOSPC, "astra.json: the disk is full")),
        (OSError(errno.EFBIG, "File too large"), (download.TOO_LARGE, "astra.json has more than 16 MiB")),
        (ValueError("bad\nworse"), (1, "astra.json: bad")),
        (TimeoutError(), (1, "astra.json: TimeoutError")),
    ],
)
def test_each_error_has_a_status_and_one_line(error: Exception, expected: tuple[int, str]) -> None:
    status, line = download._failure("astra.json", 2**24, error)
    assert (status, line.startswith(expected[1])) == (expected[0], True)
    assert len(line.splitlines()) == 1


def test_a_full_disk_is_said(web: Web, store: Store, monkeypatch) -> None:
    failures = []

    async def full(*_: Any) -> None:
        failures.append(1)
        raise CannotStore("the disk is full")

    monkeypatch.setattr("astra_serve.adapters.fetch._download", full)
    assert refused(web.url, store, CannotStore) == "the disk is full"
    assert len(failures) == 1
    store.collect({store.add(_copy(web, store))}, newest=0)


def _copy(web: Web, store: Store) -> Path:
    folder = store.staging()
    for name, content in web.files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_full_disk_gets_room_from_versions_that_nothing_needs(web: Web, store: Store, monkeypatch) -> None:
    spare = store.add(_copy(web, store))
    store.collect(set(), newest=3)
    failures = []
    original = fetch.__globals__["_download"]

    async def full_once(*arguments: Any) -> None:
        if not failures:
            failures.append(1)
            raise CannotStore("the disk is full")
        await original(*arguments)

    monkeypatch.setattr("astra_serve.adapters.fetch._download", full_once)
    assert fetched(web.url, store)
    assert spare not in store
