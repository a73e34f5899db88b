"""Names with a namespace in the paths of the admin API."""

from pathlib import Path

import httpx
import pytest

from astra_serve.control import path_names
from tests.astra_serve.world import in_a_loop

SLASH = path_names._SLASH


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/adapters/team%2Fsql/rollback", f"/adapters/team{SLASH}sql/rollback"),
        (b"/adapters/team%2fsql", f"/adapters/team{SLASH}sql"),
        (b"/adapters/team/rollback", "/adapters/team/rollback"),
        (b"/adapters/a%252Fb", "/adapters/a%2Fb"),
        (b"/adapters/a%2Fb%2Fc", f"/adapters/a{SLASH}b{SLASH}c"),
        (b"/adapters/..%2F..%2Fetc", f"/adapters/..{SLASH}..{SLASH}etc"),
        (b"/adapters/a%1Fb", "/adapters/a\ufffdb"),
        (b"/adapters/a?source=x%2Fy", "/adapters/a"),
        (b"/adapters/%C3%A4", "/adapters/ä"),
        (b"/adapters/\xff", "/adapters/\ufffd"),
    ],
)
def test_an_encoded_slash_stays_inside_of_its_part(raw: bytes, path: str) -> None:
    assert path_names.path_of(raw) == path


@in_a_loop
async def test_a_path_without_its_raw_bytes_is_as_it_was() -> None:
    async def app(scope, _receive, _send) -> None:
        seen.append(scope["path"])

    seen: list[str] = []
    await path_names.EncodedSlashes(app)({"type": "http", "path": "/a/b"}, None, None)  # type: ignore[arg-type]
    assert seen == ["/a/b"]


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
        for name in ("a%2Fb%2Fc", "..%2Fx", "%2Fx", "x%2F", "a%252Fb", "a%1Fb", "a%5Cb", "a%2F%2Fb"):
            answer: httpx.Response = await w.api.put(f"/adapters/{name}", json={"source": source})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400), name
        assert (await w.api.get("/adapters/team/sql")).status_code == 404
        assert (await w.api.put("/adapters/team/sql", json={"source": source})).status_code == 404
        assert set(tmp_path.rglob("*")) == before
