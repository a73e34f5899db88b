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

from astra_serve.adapters.fetch import Sources, fetch
from astra_serve.adapters.progress import FetchLimits
from astra_serve.adapters.store import Store
from astra_serve.adapters.version_files import version_digest
from astra_serve.errors import CannotFetch
from converter.adapter_dir import MalformedAdapter
from tests.astra_serve.world import in_a_loop
from tests.support.slow_files import slow_files

COMMIT = 40 * "a"


class StubHub(BaseHTTPRequestHandler):
    """One repository with one revision, `v1`."""

    files: ClassVar[dict[str, bytes]] = {}
    moved: ClassVar[dict[str, str]] = {}
    elsewhere: ClassVar[dict[str, bytes]] = {}
    failing: ClassVar[dict[str, int]] = {}  # the status of files that are listed
    asked: ClassVar[list[str]] = []
    broken: ClassVar[int] = 0  # the status of every answer, if it is not 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.broken:
            self.send_error(self.broken)
            return
        *_, last = self.path.split("/")
        if self.path.startswith("/api/models/org/adapter/revision/v1"):
            siblings = [{"rfilename": name} for name in {**self.files, **self.elsewhere}]
            self._answer(json.dumps({"id": "org/adapter", "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith(f"/api/models/org/adapter/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": "0"}
                for n, d in {**self.files, **self.elsewhere}.items()
            ]
            self._answer(json.dumps(tree).encode())
        elif self.path.startswith("/org/adapter/resolve/") and last in self.files:
            if last in self.failing:
                self.send_error(self.failing[last])
            else:
                self._answer(self.files[last])
        elif last in self.moved and self.path.startswith("/org/adapter/"):  # as the hub sends large files elsewhere
            self.send_response(302)
            self.send_header("Location", self.moved[last])
            self.send_header("X-Linked-ETag", '"1"')
            self.send_header("X-Linked-Size", str(len(self.elsewhere[last])))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/elsewhere/"):
            self._answer(self.elsewhere[last])
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
    for name in ("moved", "elsewhere", "failing"):
        monkeypatch.setattr(StubHub, name, {})
    monkeypatch.setattr(StubHub, "asked", [])
    monkeypatch.setattr(StubHub, "broken", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    yield StubHub
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(source: str, store: Store, sources: Sources | None = None) -> Path:
    return asyncio.run(fetch(source, store, (), sources))


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


def test_a_pickle_on_the_hub_is_not_fetched_and_the_line_names_the_command_that_helps(hub, store, write_lora) -> None:
    hub.files |= {path.name: path.read_bytes() for path in write_lora("one", 1.0).iterdir()}
    hub.files["adapter_model.bin"] = hub.files.pop("adapter_model.safetensors")
    with pytest.raises(CannotFetch) as refused:
        fetched("hf://org/adapter@v1", store)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(
        "hf://org/adapter@v1 cannot be fetched: it has only adapter_model.bin, a pickle, which can run"
    )
    assert "astra-convert DIR OUT_DIR --allow-pickle" in line
    assert not any("adapter_model.bin" in path for path in hub.asked)


@pytest.mark.parametrize("other_host", [False, True])
def test_the_hub_may_send_a_file_from_elsewhere(hub, store, write_lora, other_host: bool) -> None:
    source = write_lora("one", 1.0)
    hub.files |= {path.name: path.read_bytes() for path in source.iterdir()}
    hub.elsewhere["adapter_model.safetensors"] = hub.files.pop("adapter_model.safetensors")
    host = os.environ["HF_ENDPOINT"].replace("127.0.0.1", "localhost") if other_host else ""
    hub.moved["adapter_model.safetensors"] = f"{host}/elsewhere/adapter_model.safetensors"
    assert version_digest(fetched("hf://org/adapter@v1", store)) == version_digest(source)


def test_a_redirect_to_itself_is_one_line(hub, store, write_lora) -> None:
    hub.files |= {path.name: path.read_bytes() for path in write_lora("one", 1.0).iterdir()}
    hub.elsewhere["adapter_model.safetensors"] = hub.files.pop("adapter_model.safetensors")
    hub.moved["adapter_model.safetensors"] = "/org/adapter/resolve/v1/adapter_model.safetensors"
    with pytest.raises(CannotFetch, match=r"cannot be fetched: adapter_model\.safetensors: ") as caught:
        fetched("hf://org/adapter@v1", store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [500, 404])
def test_an_error_of_the_hub_on_a_record_that_it_lists_fails_the_download(hub, store, write_lora, status: int) -> None:
    hub.files |= {path.name: path.read_bytes() for path in write_lora("one", 1.0).iterdir()}
    hub.failing["astra.json"] = status
    with pytest.raises(CannotFetch, match=r"hf://org/adapter@v1 cannot be fetched: astra\.json: "):
        fetched("hf://org/adapter@v1", store)


def test_a_hub_that_fails_is_not_replaced_by_what_its_cache_has_without_the_record(
    hub, store, write_lora, tmp_path
) -> None:
    source = write_lora("one", 1.0)
    hub.files |= {path.name: path.read_bytes() for path in source.iterdir()}
    fetched("hf://org/adapter@v1", store)
    (cached,) = (tmp_path / "hub").glob("models--org--adapter/snapshots/*")
    (cached / "astra.json").unlink()
    hub.broken = 500
    with pytest.raises(CannotFetch, match="hf://org/adapter@v1 cannot be fetched: "):
        fetched("hf://org/adapter@v1", store)


def test_a_file_that_the_hub_lists_as_too_large_is_not_downloaded(hub, store, write_lora) -> None:
    hub.files |= {path.name: path.read_bytes() for path in write_lora("one", 1.0).iterdir()}
    hub.files["adapter_model.safetensors"] = bytes(20 << 20)
    with pytest.raises(MalformedAdapter, match=r"adapter_model\.safetensors has more than 17 MiB"):
        fetched("hf://org/adapter@v1", store, Sources(FetchLimits(max_bytes=17 << 20)))
    assert not any("resolve" in path and "safetensors" in path for path in hub.asked)


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
        children = psutil.Process().children()  # other tests may have left a helper of multiprocessing
        (download,) = (child for child in children if "astra_serve.adapters.download" in child.cmdline())
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


def test_a_relative_path_begins_in_the_folder_of_the_document(store, write_lora, monkeypatch) -> None:
    folder = write_lora("one", 1.0)
    monkeypatch.chdir("/")
    sources = Sources(folder=folder.parent)
    assert fetched("./one", store, sources) == folder
    assert fetched(f"../{folder.parent.name}/one", store, sources) == folder
    assert asyncio.run(sources.fingerprint("one")) == asyncio.run(Sources().fingerprint(str(folder)))
    with pytest.raises(CannotFetch, match="one is a relative path, and the document is no file here"):
        fetched("one", store, Sources())
    assert asyncio.run(Sources().fingerprint("one")) == []


def test_a_local_file_that_is_too_large_is_refused_before_it_is_read(store, write_lora) -> None:
    source = write_lora("one", 1.0)
    with (source / "adapter_model.safetensors").open("ab") as file:
        file.truncate(3 << 30)  # sparse: reading it takes seconds
    with pytest.raises(MalformedAdapter, match=r"one: adapter_model\.safetensors has more than 100 MiB, the limit"):
        fetched(str(source), store, Sources(FetchLimits(max_bytes=100 << 20)))
    (source / "adapter_model.safetensors").unlink()
    (source / "astra.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(MalformedAdapter, match=r"astra\.json has more than 16 MiB, the limit"):
        fetched(str(source), store)


@in_a_loop
async def test_files_of_a_hubs_cache_must_be_in_the_roots_too(write_lora, store, tmp_path) -> None:
    """The cache's links lead from `snapshots` to `blobs` beside it."""
    blobs, cached = tmp_path / "models" / "blobs", tmp_path / "models" / "snapshots" / "1"
    cached.mkdir(parents=True)
    write_lora("one", 1.0).rename(blobs)
    for file in blobs.iterdir():
        (cached / file.name).symlink_to(file)
    assert await fetch(str(cached), store, (tmp_path / "models",)) == cached
    with pytest.raises(CannotFetch, match="is outside of the folders that adapters may be in"):
        await fetch(str(cached), store, (tmp_path / "models" / "snapshots",))
