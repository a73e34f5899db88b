"""Names with a namespace in the paths of the admin API."""

from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from pydantic import TypeAdapter

from astra_serve.adapters.upload_target import UploadTarget
from astra_serve.control import path_names
from tests.astra_serve.world import in_a_loop
from tests.support import tars

NAME = TypeAdapter[str](path_names.PathName)


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/adapters/team%2Fsql/rollback", "/adapters/team%2Fsql/rollback"),
        (b"/adapters/team%2fsql", "/adapters/team%2Fsql"),
        (b"/adapters/team/rollback", "/adapters/team/rollback"),
        (b"/prepared/%74eam%2Fsql", "/prepared/team%2Fsql"),
        (b"/root/adapters/team%2Fsql", "/root/adapters/team%2Fsql"),  # below a root path
        (b"/adapters/a%252Fb", "/adapters/a%252Fb"),
        (b"/adapters/a%2525", "/adapters/a%2525"),
        (b"/adapters/a%2Fb%2Fc", "/adapters/a%2Fb%2Fc"),
        (b"/adapters/..%2F..%2Fetc", "/adapters/..%2F..%2Fetc"),
        (b"/adapters/../etc", "/adapters/../etc"),
        (b"/adapters//", "/adapters//"),
        (b"/adapters/a%", "/adapters/a%25"),
        (b"/adapters/a?source=x%2Fy", "/adapters/a"),
        (b"/adapters/%C3%A4", "/adapters/ä"),
        (b"/adapters/\xff", "/adapters/\ufffd"),
    ],
)
def test_an_encoded_slash_stays_inside_of_its_part(raw: bytes, path: str) -> None:
    assert path_names.path_of(raw) == path


@pytest.mark.parametrize("name", ["sql", "team/sql", "a%2Fb", "a%b", "a%25", "a/b/c", "..", "ä", "a%2fb/c"])
def test_a_part_is_decoded_once(name: str) -> None:
    assert NAME.validate_python(path_names.path_of(quote(name, safe="").encode())) == name


@in_a_loop
async def test_a_path_without_its_raw_bytes_has_no_encoded_slash() -> None:
    async def app(scope, _receive, _send) -> None:
        seen.append(scope.get("path"))

    seen: list[str | None] = []
    for scope in ({"type": "http", "path": "/a/b"}, {"type": "http", "path": "/a%2Fb"}, {"type": "lifespan"}):
        await path_names.EncodedSlashes(app)(scope, None, None)  # type: ignore[arg-type]
    assert seen == ["/a/b", "/a%252Fb", None]


@in_a_loop
async def test_an_adapter_of_a_namespace_is_published_shown_rolled_back_and_removed(world, write_lora) -> None:
    async with world() as w:
        sources = [write_lora("one", 1.0), write_lora("two", 2.0)]
        for source in sources:
            answer = await w.api.put("/adapters/team%2Fsql", json={"source": str(source)})
            assert (answer.status_code, answer.json()["name"]) == (200, "team/sql")
        assert (await w.api.put("/adapters/team", json={"source": str(sources[0])})).is_success
        assert set(w.fleet.aliases) == {"team/sql", "team"}
        shown = (await w.api.get("/adapters/team%2fsql")).json()
        assert shown["version"]["name"].startswith("team/sql@")
        assert (await w.api.post("/adapters/team/rollback")).status_code == 409  # `team` has one version alone
        back = await w.api.post("/adapters/team%2Fsql/rollback")
        assert back.json()["version"]["digest"] == shown["previous"][0]["digest"]
        assert (await w.api.delete("/adapters/team%2Fsql")).is_success
        assert set(w.fleet.aliases) == {"team"}


@in_a_loop
async def test_a_name_has_one_slash_at_most_and_touches_no_folder(world, write_lora, tmp_path: Path) -> None:
    async with world() as w:
        source = str(write_lora("one", 1.0))
        before = set(tmp_path.rglob("*"))
        for name in ("a%2Fb%2Fc", "..%2Fx", "x%2F..", "x%2F.", "%2Fx", "x%2F", "a%252Fb", "a%1Fb", "a%5Cb", "a%2F%2Fb"):
            for path in ("adapters", "prepared"):
                answer: httpx.Response = await w.api.put(f"/{path}/{name}", json={"source": source})
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400), name
            assert (await w.api.get(f"/adapters/{name}")).status_code == 404
        assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/adapters/team/sql"),
        ("PUT", "/adapters/team/sql"),
        ("DELETE", "/adapters/team/sql"),
        ("PUT", "/prepared/team/sql"),
        ("POST", "/adapters/team/sql/rollback"),
        ("GET", "/adapters%2Fsql"),
    ],
)
@in_a_loop
async def test_a_bare_slash_is_no_part_of_a_name_and_the_answer_says_how_to_write_one(world, method, path) -> None:
    async with world() as w:
        for headers in ({}, {"Content-Type": "application/x-tar"}):
            answer = await w.api.request(method, path, content=b"{}", headers=headers)
            assert answer.status_code == 404
            assert f"{method} {path} is not served" in (message := answer.json()["error"]["message"])
            assert ("the slash of an adapter's name is %2F" in message) == ("/sql" in path)


@in_a_loop
async def test_a_namespaces_adapter_is_uploaded_prepared_pinned_and_drained_as_any_other(
    world, write_lora, tmp_path: Path
) -> None:
    target = UploadTarget(str(tmp_path / "shared"))
    async with world(upload_to=target) as w:
        headers = {"Content-Type": "application/x-tar"}
        content = tars.tar_of(write_lora("one", 1.0))
        answer = await w.api.put("/adapters/team%2Fsql?pin=true", content=content, headers=headers)
        assert (answer.status_code, answer.json()["pin"]) == (200, True)
        assert [path.name for path in (tmp_path / "shared").iterdir()] == [w.current("team/sql")[7:]]
        prepared = (await w.api.put("/prepared/team%2Fsql", json={"source": str(write_lora("two", 2.0))})).json()
        assert prepared["name"].startswith("team/sql@")
        assert (await w.api.post("/adapters/team%2Fsql/unload")).status_code == 409  # it is pinned
        assert (await w.api.post("/adapters/team%2Fsql/unpin")).json()["pin"] is False
        canary = {"source": prepared["digest"], "weight": 0.5}
        assert (await w.api.post("/adapters/team%2Fsql/canary", json=canary)).json()["canary"]["weight"] == 0.5
        assert (await w.api.delete("/adapters/team%2Fsql/canary")).json()["canary"] is None
        assert (await w.api.get("/adapters/team%2Fsql/", follow_redirects=True)).json()["name"] == "team/sql"
        assert not list(tmp_path.rglob("team*"))  # no folder or file has a name of it
