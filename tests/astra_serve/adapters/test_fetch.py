"""Adapters from where they are kept: a hub and an object store that run on this machine, over real HTTP."""

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import psutil
import pytest
import s3fs

from astra_serve.adapters.fetch import fetch
from astra_serve.adapters.store import Store, version_digest
from astra_serve.errors import CannotFetch
from tests.astra_serve.world import in_a_loop
from tests.support.slow_files import slow_files

COMMIT = 40 * "a"


class StubHub(BaseHTTPRequestHandler):
    """One repository with one revision, `v1`."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        *_, last = self.path.split("/")
        if self.path.startswith("/api/models/org/adapter/revision/v1"):
            siblings = [{"rfilename": name} for name in self.files]
            self._answer(json.dumps({"id": "org/adapter", "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith(f"/api/models/org/adapter/tree/{COMMIT}"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in self.files.items()]
            self._answer(json.dumps(tree).encode())
        elif self.path.startswith(f"/org/adapter/resolve/{COMMIT}/") and last in self.files:
            self._answer(self.files[last])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hash(data):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> Iterator[type[StubHub]]:
    monkeypatch.setattr(StubHub, "files", {})
    monkeypatch.setattr(StubHub, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    yield StubHub
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(source: str, store: Store) -> Path:
    return asyncio.run(fetch(source, store))


def test_an_adapter_comes_from_a_hub_at_its_revision(hub, store, write_lora) -> None:
    source = write_lora("one", 1.0)
    hub.files |= {path.name: path.read_bytes() for path in source.iterdir()}
    hub.files["extra.py"] = b"import os"
    folder = fetched("hf://org/adapter@v1", store)
    assert version_digest(folder) == version_digest(source)
    assert not (folder / "extra.py").exists()
    assert not any("extra.py" in path for path in hub.asked)


def test_a_revision_missing_on_the_hub_is_one_line_and_leaves_nothing(hub, store, tmp_path) -> None:
    with pytest.raises(CannotFetch, match="hf://org/adapter@v2 cannot be fetched"):
        fetched("hf://org/adapter@v2", store)
    assert hub.asked
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_an_adapter_comes_from_a_web_server_with_or_without_its_record(store, write_lora, tmp_path) -> None:
    source = write_lora("one", 1.0)
    with slow_files(tmp_path / "web", [source]) as (url,):
        assert version_digest(fetched(url, store)) == version_digest(source)
        (source / "astra.json").unlink()
        folder = fetched(f"{url}/", store)
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        with pytest.raises(CannotFetch, match="cannot be fetched"):
            fetched(f"{url}1", store)


def test_an_adapter_comes_from_an_object_store(bucket, store, write_lora) -> None:
    source = write_lora("one", 1.0)
    s3fs.S3FileSystem().put(str(source), "adapters/one", recursive=True)
    assert version_digest(fetched(f"{bucket}/one", store)) == version_digest(source)


def test_a_missing_object_is_one_line_without_the_credentials(bucket, store, tmp_path) -> None:
    with pytest.raises(CannotFetch, match="s3://adapters/none cannot be fetched") as caught:
        fetched(f"{bucket}/none", store)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert not list((tmp_path / "store" / "staging").iterdir())


@in_a_loop
async def test_a_download_that_is_cancelled_ends_and_leaves_nothing(store, tmp_path) -> None:
    """From a server that accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        fetching = asyncio.create_task(fetch(f"http://127.0.0.1:{port}/adapter", store))
        connection, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
        (download,) = psutil.Process().children()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        assert not psutil.pid_exists(download.pid)
        connection.close()
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_a_password_in_a_source_is_in_no_argument_and_in_no_message(store) -> None:
    with pytest.raises(CannotFetch) as caught:
        fetched("http://user:hunter2@127.0.0.1:9/adapter?token=hunter3", store)
    assert "hunter" not in str(caught.value)
    assert "http://127.0.0.1:9/adapter cannot be fetched" in str(caught.value)
