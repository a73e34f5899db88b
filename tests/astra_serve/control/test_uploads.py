"""Adapters that arrive as bytes at the admin port, and are published as any other."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from astra_serve.adapters.fetch import Sources
from astra_serve.adapters.progress import FetchLimits
from astra_serve.adapters.store import Store
from astra_serve.adapters.upload_target import UploadTarget
from astra_serve.adapters.version_files import version_digest
from tests.astra_serve.stand_in import StandInEngine
from tests.astra_serve.world import TOKEN, World, in_a_loop, server
from tests.support import tars
from tests.support.tars import CONFIG, REFUSED

TAR = {"Content-Type": "application/x-tar"}
LIMITS = FetchLimits(max_bytes=2**20, stall_s=0.3)


@pytest.fixture
def taking(world, tmp_path: Path):
    """A server that takes uploads, and copies them to the folder `shared`."""
    return lambda **more: world(**{"upload_to": UploadTarget(str(tmp_path / "shared")), **more})


def nothing_left(w: World, tmp_path: Path) -> None:
    """Nothing of an upload that was refused is in the staging area, at the target or in the document."""
    assert list((tmp_path / "store" / "staging").iterdir()) == []
    assert not (tmp_path / "shared").exists() or list((tmp_path / "shared").iterdir()) == []
    assert not w.file.exists()


@in_a_loop
async def test_an_upload_serves_and_its_copy_is_the_entrys_source(taking, write_lora, tmp_path) -> None:
    source = write_lora("one", 1.0)
    async with taking() as w:
        answer = await w.api.put("/adapters/a?required=true&pin=true", content=tars.tar_of(source), headers=TAR)
        assert (answer.status_code, answer.json()["state"]) == (200, "serving"), answer.text
        entry, digest = w.entry("a"), version_digest(source)
        assert (entry.digest, entry.required, entry.pin) == (digest, True, True)
        assert entry.source == str(tmp_path / "shared" / digest.removeprefix("sha256:"))
        assert version_digest(Path(entry.source)) == digest
        assert w.store.source(digest) == entry.source
        assert list((tmp_path / "store" / "staging").iterdir()) == []
        again = await w.api.put("/adapters/b", content=tars.tar_of(source), headers=TAR)
        assert again.json()["source"] == entry.source


@pytest.mark.parametrize("to", ["{}", "file://{}", "bucket"])
@in_a_loop
async def test_another_replica_fetches_the_copy(taking, base, write_lora, tmp_path, bucket, to: str) -> None:
    to = f"{bucket}/uploads" if to == "bucket" else to.format(tmp_path / "shared")
    store, engine = Store(tmp_path / "other"), StandInEngine(2)
    async with taking(upload_to=UploadTarget(to)) as w, server(engine, store, base, w.file) as other:
        answer = await w.api.put("/adapters/a", content=tars.tar_of(write_lora("one", 1.0)), headers=TAR)
        assert answer.json()["source"].startswith(to)
        await other.control.refresh()
        assert (await other.settled("a")).phase == "serving"
        assert other.current("a") == w.current("a")
    store.close()


async def never() -> AsyncIterator[bytes]:
    raise AssertionError("the body is read")
    yield b""


@pytest.mark.parametrize(
    ("path", "headers", "status", "message"),
    [
        ("/adapters/a", {"Authorization": "Bearer wrong"}, 401, "the admin token is missing or wrong"),
        ("/adapters/a", {"Content-Length": "999999999999"}, 413, "an adapter of this base has at most"),
        ("/adapters/a b", {}, 400, "use up to 128 letters"),
        ("/adapters/a?digest=abc", {}, 400, "a digest is sha256:"),
        ("/adapters/a?digets=abc", {}, 400, "digets"),
        ("/adapters/a?pin=perhaps", {}, 400, "pin"),
    ],
)
@in_a_loop
async def test_a_fault_is_found_before_the_body_is_read(taking, path, headers, status, message, tmp_path) -> None:
    async with taking() as w:
        answer = await w.api.put(path, content=never(), headers={**TAR, **headers})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
        assert message in answer.json()["error"]["message"]
        nothing_left(w, tmp_path)


@in_a_loop
async def test_other_routes_keep_their_limit_of_a_body(taking) -> None:
    async with taking() as w:
        answer = await w.api.put("/prepared/a", content=bytes(2**21), headers=TAR)
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "RequestTooLargeError")


@in_a_loop
async def test_a_server_without_a_target_says_which_option_it_needs(world) -> None:
    async with world() as w:
        answer = await w.api.put("/adapters/a", content=never(), headers=TAR)
        assert answer.status_code == 409
        assert "start it with --upload-to" in answer.json()["error"]["message"]


@pytest.mark.parametrize("fault", REFUSED)
@in_a_loop
async def test_a_hostile_tar_leaves_nothing(taking, tmp_path, fault: str) -> None:
    async with taking(sources=Sources(LIMITS)) as w:
        answer = await w.api.put("/adapters/a", content=REFUSED[fault][0], headers=TAR)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (413 if "has more than" in error["message"] else 400, "BadUpload")
        nothing_left(w, tmp_path)


@in_a_loop
async def test_a_body_that_stalls_is_given_up(taking, tmp_path) -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield tars.entry(CONFIG, b"{}")
        await asyncio.sleep(60)

    async with taking(sources=Sources(LIMITS)) as w:
        answer = await w.api.put("/adapters/a", content=stalls(), headers=TAR)
        assert (answer.status_code, answer.json()["error"]["type"]) == (408, "BadUpload")
        assert "nothing for 0 s" in answer.json()["error"]["message"]
        nothing_left(w, tmp_path)


@in_a_loop
async def test_a_client_that_disconnects_leaves_nothing(taking, tmp_path) -> None:
    scope = {"type": "http", "method": "PUT", "path": "/adapters/a", "query_string": b"", "root_path": ""}
    headers = [(b"authorization", f"Bearer {TOKEN}".encode()), (b"content-type", b"application/x-tar")]
    messages = [{"type": "http.request", "body": tars.entry(CONFIG, b"{}"), "more_body": True}]

    async def receive() -> Any:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    async with taking() as w:
        await w.admin_app({**scope, "headers": headers}, receive, send)
        nothing_left(w, tmp_path)


@in_a_loop
async def test_an_adapter_that_is_refused_is_not_copied(taking, write_lora, tmp_path) -> None:
    zero, one = tars.tar_of(write_lora("zero", 0.0)), tars.tar_of(write_lora("one", 1.0))
    without = tars.tar((CONFIG, b"{}"))
    async with taking() as w:
        for body, query, message in (
            (zero, "", "changes nothing"),
            (without, "", "'a' was not published: the upload"),
            (one, f"?digest=sha256:{64 * '0'}", "its digest is"),
        ):
            answer = await w.api.put(f"/adapters/a{query}", content=body, headers=TAR)
            assert (answer.status_code, answer.json()["error"]["type"]) == (422, "NotPublished")
            assert message in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.json()["error"]["message"]
            nothing_left(w, tmp_path)
        answer = await w.api.put("/adapters/a?allow_no_effect=true", content=zero, headers=TAR)
        assert answer.status_code == 200


@in_a_loop
async def test_a_target_that_cannot_be_written_changes_nothing(taking, write_lora, tmp_path) -> None:
    one, two = (tars.tar_of(write_lora(name, value)) for name, value in (("one", 1.0), ("two", 2.0)))
    async with taking() as w:
        await w.api.put("/adapters/a", content=one, headers=TAR)
        before = w.file.read_text(), w.current("a")
        (tmp_path / "shared").rename(tmp_path / "moved")
        (tmp_path / "shared").write_text("")
        answer = await w.api.put("/adapters/a", content=two, headers=TAR)
        assert answer.status_code == 422
        assert "it cannot be copied to" in answer.json()["error"]["message"]
        assert (w.file.read_text(), w.current("a")) == before


@in_a_loop
async def test_a_newer_publish_supersedes_an_upload_before_its_write(taking, write_lora) -> None:
    async with taking() as w:
        w.engine.gate.clear()
        body = tars.tar_of(write_lora("one", 1.0))
        first = asyncio.create_task(w.api.put("/adapters/a", content=body, headers=TAR))
        while "loading" not in w.seen("a"):
            await asyncio.sleep(0.01)
        second = asyncio.create_task(w.api.put("/adapters/a", json={"source": str(write_lora("two", 2.0))}))
        answer = await first
        assert (answer.status_code, answer.json()["error"]["type"]) == (409, "Superseded")
        w.engine.gate.set()
        assert (await second).status_code == 200
