"""The policies of a trainer, with a stand-in for the engine; tests/slow lets TRL's own client call a real server."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from astra_serve.adapters.store import Store
from astra_serve.control import policy_port
from astra_serve.gateway.middleware import Served
from converter import adapter_dir
from converter.adapter_dir import LoraAdapter
from tests.astra_serve.gateway.test_gateway import body_of, say
from tests.astra_serve.stand_in import MODULE
from tests.astra_serve.world import INFO, World, in_a_loop, quiet, running

Rollout = Callable[..., Any]


async def load(w: World, name: str, folder: Path | str) -> httpx.Response:
    """Load as TRL's client does."""
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": False}
    return await w.trainer.post("/v1/load_lora_adapter", json=body)


async def unload(w: World, name: str) -> int:
    return (await w.trainer.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code


class Handler:
    """Answers with the version of the request; each request waits for `go` first."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        asked = json.loads(await body_of(receive))["model"]
        await self.go.wait()
        await say(send, {"model": Served().get(asked)})


async def rollout(w: World, model: str) -> tuple[int, str | None]:
    """Return the status of a completion by token ids, and the version that the answer names."""
    answer = await w.trainer.post("/v1/completions", json={"model": model, "prompt": [1, 2, 3], "logprobs": 0})
    return answer.status_code, answer.json().get("model")


@pytest.fixture
def write_start(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Write a LoRA as it is before the first step: B is zero."""

    def write(name: str) -> Path:
        layers = {MODULE: (torch.full((4, 32), 1.0), torch.zeros(32, 4))}
        with adapter_dir.new_folder(tmp_path / name) as partial:
            adapter_dir.save_lora(partial, LoraAdapter(layers, {"r": 4, "lora_alpha": 4}, {}))
        return tmp_path / name

    return write


@in_a_loop
async def test_a_load_returns_when_the_version_serves_and_names_its_digest(world, write_lora) -> None:
    async with world(handler=Handler()) as w:
        answer = (await load(w, "p-v1", write_lora("one", 1.0))).json()
        version = w.fleet.aliases["p-v1"].current
        assert (answer["version"], answer["digest"], answer["state"]) == (version.name, version.digest, "serving")
        assert answer["probe"]["prompts"] == 8
        assert await rollout(w, "p-v1") == (200, version.name)


@in_a_loop
async def test_a_policy_may_have_a_namespace_and_not_the_bases_name(world, write_lora, tmp_path: Path) -> None:
    async with world(handler=Handler()) as w:
        await w.control.refresh()
        version = (await load(w, "team/p-v1", write_lora("one", 1.0))).json()["version"]
        assert version.startswith("team/p-v1@")
        assert await rollout(w, "team/p-v1") == (200, version)
        assert await unload(w, "p-v1") == 404
        assert await unload(w, "team/p-v1") == 200
        assert (await rollout(w, "team/p-v1"))[0] == 404
        for name in ("team/p/v1", "team/..", "/p", "team%2Fp"):
            answer = await load(w, name, write_lora("two", 2.0) if name == "team/p/v1" else tmp_path / "two")
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadDocument")
        w.fleet.base_name = "Qwen/Qwen3-0.6B"
        refused = await load(w, w.fleet.base_name, tmp_path / "two")
        assert (refused.status_code, w.fleet.resolve(w.fleet.base_name)) == (422, None)
        assert "it has the base's name" in refused.json()["error"]["message"]
        assert not list(tmp_path.rglob("team*"))


@in_a_loop
async def test_the_policy_before_the_first_step_changes_nothing_and_is_served(world, write_start, engine) -> None:
    engine.silent.add("p-v1")
    async with world() as w:
        assert (await load(w, "p-v1", write_start("start"))).json()["probe"]["effect"] == 0.0


@in_a_loop
async def test_a_name_that_is_loaded_again_with_other_bytes_is_a_new_version(world, write_lora) -> None:
    async with world(handler=Handler()) as w:
        first = (await load(w, "p", write_lora("one", 1.0))).json()["version"]
        second = (await load(w, "p", write_lora("two", 2.0))).json()["version"]
        assert first != second
        assert await rollout(w, "p") == (200, second)
        assert (await load(w, "p", write_lora("three", 2.0))).json()["version"] == second  # the same bytes
        await w.residency.idle()
        assert w.engine.loads == [first, second]  # the engine knows each by a name of its own: no prefix is shared
        assert list(w.engine.loaded) == [second]


@in_a_loop
async def test_an_unloaded_name_answers_404_at_once_while_its_rollouts_end_on_their_version(world, write_lora) -> None:
    handler = Handler()
    async with world(handler=handler) as w:
        await w.control.refresh()  # the document, which might have the name
        version = (await load(w, "p-v1", write_lora("one", 1.0))).json()["version"]
        handler.go.clear()
        running_one = asyncio.create_task(rollout(w, "p-v1"))
        await quiet()
        assert await unload(w, "p-v1") == 200
        assert (await rollout(w, "p-v1"))[0] == 404
        assert w.loaded() == ["p-v1"]
        handler.go.set()
        assert await running_one == (200, version)
        await w.residency.idle()
        assert w.loaded() == []
        assert await unload(w, "p-v1") == 404


@in_a_loop
async def test_policies_are_in_neither_document_nor_store_and_go_with_the_server(world, write_lora, store) -> None:
    async with world() as w:
        digest = (await load(w, "p-v1", write_lora("one", 1.0))).json()["digest"]
        assert not w.file.exists()
        assert digest not in store
        assert not list(store.folder(digest).parent.iterdir())
        assert (await w.api.get("/adapters")).json()["adapters"] == []
        folder = w.passing.verify(digest)
    assert not folder.exists()


def test_policies_of_a_server_that_was_killed_are_gone_at_the_next_start(store, write_lora) -> None:
    killed = store.passing()
    root = killed.folder(killed.add(write_lora("one", 1.0))).parents[2]
    assert (root / "passing").exists()
    for one in (killed, store):
        one._lock.close()  # which is all that the end of a process does
    again = Store(root)
    assert not (root / "passing").exists()
    again.close()


@in_a_loop
async def test_the_disk_has_only_the_policies_that_a_name_or_a_request_needs(world, write_lora) -> None:
    handler = Handler()
    async with world(capacity=3, handler=handler) as w, running(w.policies):
        digests = [(await load(w, "p-v0", write_lora("0", 1.0))).json()["digest"]]
        handler.go.clear()
        slow = asyncio.create_task(rollout(w, "p-v0"))
        await quiet()
        for step in range(1, 6):
            digests.append((await load(w, f"p-v{step}", write_lora(str(step), 1.0 + step))).json()["digest"])
            await unload(w, f"p-v{step - 1}")
        await w.clock.advance(5)
        async with w.policies._turn:  # a thread removes them
            pass
        assert [digest in w.passing for digest in digests] == [True, False, False, False, False, True]
        handler.go.set()
        await slow


@in_a_loop
async def test_one_policy_too_many_takes_the_place_of_the_least_recently_used_one(world, write_lora) -> None:
    async with world(handler=Handler()) as w:
        for step in (1, 2):
            await w.clock.advance(1)
            await load(w, f"p-v{step}", write_lora(str(step), float(step)))
        await w.clock.advance(1)
        assert (await rollout(w, "p-v1"))[0] == 200
        assert (await load(w, "p-v3", write_lora("3", 3.0))).status_code == 200
        assert set(w.fleet.aliases) == {"p-v1", "p-v3"}
        (event,) = (event for event in w.events.newest if event.event == "removed")
        assert (event.adapter, event.reason) == ("p-v2", "there are more than 2 policies (--resident)")


@in_a_loop
async def test_a_policy_with_running_rollouts_is_never_taken_for_another_one(world, write_lora) -> None:
    handler = Handler()
    async with world(capacity=3, handler=handler) as w:
        w.policies._most = 2
        for step in (1, 2):
            await load(w, f"p-v{step}", write_lora(str(step), float(step)))
        handler.go.clear()
        slow = [asyncio.create_task(rollout(w, f"p-v{step}")) for step in (1, 2)]
        await quiet()
        answer = await load(w, "p-v3", write_lora("3", 3.0))
        assert answer.status_code == 422
        assert "all 2 policies have requests that run: unload one" in answer.json()["error"]["message"]
        handler.go.set()
        assert {status for status, _ in await asyncio.gather(*slow)} == {200}


@in_a_loop
async def test_a_policy_is_proved_like_a_request_and_not_behind_them(world, write_lora, engine) -> None:
    async with world() as w:
        await load(w, "p-v1", write_lora("one", 1.0))
        assert {urgent for _, _, urgent in engine.asked} == {True}


@in_a_loop
async def test_a_policy_that_the_engine_does_not_serve_as_it_is_keeps_the_version_before(
    world, write_lora, engine
) -> None:
    async with world(handler=Handler()) as w:
        version = (await load(w, "p", write_lora("one", 1.0))).json()["version"]
        for fault, reason in ((engine.refuse, "the engine cannot load it"), (engine.partly, "does not adapt 1 of its")):
            fault.add("p@")
            answer = await load(w, "p", write_lora(reason, 2.0))
            assert answer.status_code == 422
            assert reason in answer.json()["error"]["message"]
            fault.clear()
        broken = await load(w, "q", write_lora("nan", float("nan")))
        assert (broken.status_code, "finite" in broken.text) == (422, True), broken.text
        assert await rollout(w, "p") == (200, version)


@in_a_loop
async def test_nothing_outside_of_the_adapter_root_is_read(world, write_lora, tmp_path, tmp_path_factory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "lora"
    write_lora("one", 1.0).rename(outside)
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "files").mkdir()
    for file in outside.iterdir():
        (tmp_path / "files" / file.name).symlink_to(file)
    async with world() as w:
        for path in (outside, tmp_path / "link", tmp_path / "files", tmp_path / ".." / "outside" / "lora", "/etc"):
            answer = await load(w, "p", path)
            assert answer.status_code == 422
            assert "outside of the folders that adapters may be in" in answer.json()["error"]["message"]
        for path in ("one", "../one", "~/one", "file:///one", "hf://org/name", "http://127.0.0.1:1/x", "sha256:00"):
            answer = await load(w, "p", path)
            assert answer.status_code == 422
            assert "no absolute path of a folder" in answer.json()["error"]["message"]
        assert (w.fleet.aliases, w.engine.loads) == ({}, [])


@in_a_loop
async def test_a_name_belongs_to_the_document_or_to_a_trainer(world, write_lora) -> None:
    async with world(capacity=4) as w:
        await w.api.put("/adapters/sql", json={"source": str(write_lora("sql", 1.0))})
        assert (await load(w, "sql", write_lora("two", 2.0))).status_code == 409
        assert await unload(w, "sql") == 409
        assert (await load(w, w.fleet.base_name, write_lora("base", 2.0))).status_code == 422
        await load(w, "p", write_lora("three", 3.0))
        published = await w.api.put("/adapters/p", json={"source": str(write_lora("four", 4.0))})
        assert published.json()["previous"] == []  # no rollback to files that end with the server
        assert await unload(w, "p") == 409
        assert (await w.answer("p") or ("",))[1] == 4.0
        assert w.policies.served() == {}


@pytest.mark.parametrize("name", ["", "a b", "../a", "a@b", 200 * "a"])
@in_a_loop
async def test_a_name_that_cannot_be_is_refused(world, write_lora, name: str) -> None:
    async with world() as w:
        assert (await load(w, name, write_lora("one", 1.0))).status_code == 400


@in_a_loop
async def test_the_final_policy_is_published_as_an_adapter_that_stays(world, write_lora, store) -> None:
    async with world() as w:
        digest = (await load(w, "p-v9", write_lora("nine", 9.0))).json()["digest"]
        await w.api.put("/adapters/sql", json={"source": str(write_lora("same", 9.0))})
        assert w.current("sql") == digest
        assert digest in store
        await unload(w, "p-v9")
        store.verify(digest)


@in_a_loop
async def test_a_trainer_reads_the_engines_settings_as_from_vllm(world) -> None:
    async with world() as w:
        info = (await w.trainer.get("/server_info", params={"config_format": "json"})).json()["vllm_config"]
        assert info == INFO
        assert (await w.trainer.get("/get_world_size")).json() == {"world_size": 2}


@in_a_loop
async def test_pause_and_resume_answer_and_pause_nothing(world, write_lora) -> None:
    async with world(handler=Handler()) as w:
        version = (await load(w, "p", write_lora("one", 1.0))).json()["version"]
        assert (await w.trainer.post("/pause", params={"mode": "keep"})).status_code == 200
        assert await rollout(w, "p") == (200, version)
        assert (await w.trainer.post("/resume")).status_code == 200


@in_a_loop
async def test_every_path_of_the_port_wants_the_token_before_the_body_is_read(world) -> None:
    async def body() -> Any:
        raise AssertionError("the body is read")
        yield b""

    async with world() as w:
        w.trainer.auth = None
        for path in ("/v1/load_lora_adapter", "/v1/completions", "/server_info", "/health", "/none"):
            assert (await w.trainer.post(path, content=body())).status_code == 401


@in_a_loop
async def test_the_public_application_does_not_see_the_token(world) -> None:
    async def public(scope: Any, _receive: Any, send: Any) -> None:
        await say(send, [value.decode() for name, value in scope["headers"] if name == b"authorization"])

    async with world() as w:
        app = policy_port.build(w.policies, public, INFO, "the-token")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x:the-token@y") as http:
            assert (await http.get("/v1/models")).json() == []


@in_a_loop
async def test_errors_have_openais_form(world) -> None:
    async with world() as w:
        for method, path, content, status in (
            ("POST", "/v1/load_lora_adapter", b"{", 400),
            ("POST", "/v1/load_lora_adapter", b"{}", 400),
            ("POST", "/v1/load_lora_adapter", b" " * 2**21, 413),
            ("GET", "/v1/load_lora_adapter", b"", 405),
        ):
            answer = await w.trainer.request(
                method, path, content=content, headers={"Content-Type": "application/json"}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
