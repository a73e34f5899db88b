"""Hostile adapters, sources that fail or hang, and hostile documents: refused in one line, and nobody else waits."""

import gzip
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx

from benchmarks.attack.target import Target, openai_error
from converter.adapter_dir import CONFIG, LORA_WEIGHTS, PROVENANCE
from tests.support.hostile import OVERFLOWING, hostile

HANGING = 24  # publications from a source that never answers
PUBLISH_S = 30.0  # for a good publication while they hang
FOLLOW_S = 10.0  # for a document to be followed


def attack(target: Target) -> None:
    adapters(target)
    sources(target)
    documents(target)


def adapters(target: Target) -> None:
    overflowing = target.folder / "overflowing"
    folders = itertools.chain(
        hostile(target.good[0], target.folder / "hostile"), _copies(target.good[0], overflowing, OVERFLOWING)
    )
    with target.admin() as http:
        for name, folder in folders:
            for source, options in ((str(folder), {}), (str(folder), {"allow_no_effect": True})):
                body = {"source": source, **options}
                if name in ("no effect", "a forged probe") and options:
                    continue  # this is what the option is for
                target.attempt("adapters", name, lambda b=body: refused(http, b))


def _copies(good: Path, folder: Path, faults: dict[str, Callable[[Path], None]]) -> Iterator[tuple[str, Path]]:
    for number, (name, damage) in enumerate(faults.items()):
        copy = folder / str(number)
        shutil.copytree(good, copy)
        damage(copy)
        yield name, copy


def refused(http: httpx.Client, body: dict[str, Any]) -> str | None:
    """Publish what must be refused, with 4xx and one line."""
    answer = http.put("/adapters/attacked", json=body)
    if answer.is_success:
        http.delete("/adapters/attacked")
        return "it serves"
    if answer.status_code >= 500:
        return f"{answer.status_code} {answer.text[:200]}"
    return openai_error(answer) or (
        "its message has several lines" if "\n" in answer.json()["error"]["message"] else None
    )


class Source(BaseHTTPRequestHandler):
    """Files of a good adapter, with a fault that the first part of the path names."""

    good: Path
    stop: Event

    def do_GET(self) -> None:
        _, kind, name = self.path.split("/", 2)
        with suppress(OSError):  # the client was ended
            getattr(self, kind, self.plain)(name)

    do_HEAD = do_GET  # noqa: N815 (so the base class names it)

    def plain(self, name: str, *, status: int = 200) -> None:
        file = self.good / name
        content = file.read_bytes() if file.is_file() and status == 200 else b""
        self.send_response(status if file.is_file() or status != 200 else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def record500(self, name: str) -> None:
        self.plain(name, status=500 if name == PROVENANCE else 200)

    def record503(self, name: str) -> None:
        self.plain(name, status=503 if name == PROVENANCE else 200)

    def record403(self, name: str) -> None:
        self.plain(name, status=403 if name == PROVENANCE else 200)

    def config500(self, name: str) -> None:
        self.plain(name, status=500 if name == CONFIG else 200)

    def hang(self, _: str) -> None:
        self.stop.wait(300)

    def redirects(self, name: str) -> None:
        self.send_response(302)
        self.send_header("Location", f"/redirects/{name}x")
        self.end_headers()

    def endless(self, name: str) -> None:
        if name != LORA_WEIGHTS:
            self.plain(name)
            return
        self.send_response(200)
        self.end_headers()
        while not self.stop.is_set():
            self.wfile.write(bytes(2**20))

    def bomb(self, name: str) -> None:
        if name != LORA_WEIGHTS:
            self.plain(name)
            return
        content = gzip.compress(bytes(2**20)) * 4096
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def source_server(good: Path) -> Iterator[str]:
    stop = Event()
    handler = type("Handler", (Source,), {"good": good, "stop": stop})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        stop.set()
        server.shutdown()


def sources(target: Target) -> None:
    with source_server(target.good[0]) as url:
        with target.admin() as http:
            for kind in ("record500", "record503", "record403", "config500", "redirects", "endless", "bomb", "none"):
                where = f"{url}/{kind}" if kind != "none" else f"{url}/plain/none"
                target.attempt("sources", kind, lambda s=where: refused(http, {"source": s}))
        with ThreadPoolExecutor(HANGING) as pool, target.admin(timeout=2) as impatient, target.admin() as http:

            def hang(number: int) -> None:
                with suppress(httpx.HTTPError):
                    impatient.put(f"/adapters/hanging{number}", json={"source": f"{url}/hang/{number}"})

            asked = [pool.submit(hang, number) for number in range(HANGING)]
            for one in asked:
                one.result()
            target.attempt("sources", f"a publication beside {HANGING} hanging ones", lambda: _publish(target, http))
            target.check_neighbours("sources that hang")
            for number in range(HANGING):
                http.delete(f"/adapters/hanging{number}")


def _publish(target: Target, http: httpx.Client) -> str | None:
    began = time.monotonic()
    answer = http.put("/adapters/beside", json={"source": str(target.good[1])})
    seconds = time.monotonic() - began
    http.delete("/adapters/beside")
    if not answer.is_success:
        return answer.text[:200]
    return f"it takes {seconds:.0f} s" if seconds > PUBLISH_S else None


DOCUMENTS = {
    "25,000 brackets": b"[" * 25_000,
    "deep blocks": b"".join(b" " * n + b"a:\n" for n in range(3000)),
    "laughs": b"a: &a [x, x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c, *%c]\n" % (n + 1, n + 1, n, n, n) for n in range(97, 120)),
    "only comments": b"# nothing\n",
    "null": b"null\n",
    "braces": b"{}\n",
    "a key twice": b"adapters: []\nadapters: []\n",
    "no UTF-8": b"adapters: [\xff]\n",
    "a number of 5,000 digits": b"adapters: [" + b"9" * 5000 + b"]\n",
    "a tag": b"adapters: !!python/object/apply:os.system [id]\n",
    "no YAML": b"adapters: [\n",
    "a list": b"- a\n",
    "50 MB": b"adapters:\n" + b"# x\n" * 12_000_000,
    "a name twice": b"adapters: [{name: a, source: /x}, {name: a, source: /y}]\n",
    "a path as name": b"adapters: [{name: ../a, source: /x}]\n",
}


def documents(target: Target) -> None:
    """Write hostile documents in place of the good one: each is a fault, and everything serves on."""
    good = target.document.read_bytes()
    with target.admin() as http:
        for name, content in DOCUMENTS.items():
            target.document.write_bytes(content)
            target.attempt("documents", name, lambda: _is_a_fault(http))
            target.document.write_bytes(good)
    target.attempt("documents", "the good one again", lambda: _followed(target))
    target.check_neighbours("documents")


def _is_a_fault(http: httpx.Client) -> str | None:
    end = time.monotonic() + FOLLOW_S
    while time.monotonic() < end:
        found = http.get("/adapters").json()
        if found["document"]["fault"]:
            return None if len(found["adapters"]) >= 2 else "adapters are gone"
        time.sleep(0.1)
    return "is followed, or not read"


def _followed(target: Target) -> str | None:
    end = time.monotonic() + FOLLOW_S
    with target.admin() as http:
        while time.monotonic() < end:
            if http.get("/adapters").json()["document"]["fault"] is None:
                return None
            time.sleep(0.1)
    return "is not followed"
