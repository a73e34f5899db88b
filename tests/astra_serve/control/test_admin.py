"""The admin API's own promises: its token, its errors, and the routes that change no document."""

import pytest

from tests.astra_serve.world import TOKEN, in_a_loop


@in_a_loop
async def test_every_route_wants_the_token(world) -> None:
    async with world() as w:
        routes = [route for route in w.admin_app.routes if getattr(route, "methods", None)]
        assert len(routes) > 15
        for route in routes:
            for method in route.methods:
                for header in ("", "Bearer wrong", TOKEN):
                    path = route.path.replace("{name}", "a")
                    answer = await w.api.request(method, path, headers={"Authorization": header})
                    assert answer.status_code == 401, f"{method} {path}"
                    assert answer.json()["error"]["type"] == "AuthenticationError"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/adapters/a b", {"source": "x"}, 400),
        ("PUT", "/adapters/a", {"sorce": "x"}, 400),
        ("PUT", "/adapters/a", {"source": "sha256:../../etc"}, 400),
        ("PUT", "/adapters/a", {"source": "simplecache::file:///etc"}, 422),
        ("POST", "/adapters/a/rollback", {"digest": "x"}, 400),
        ("POST", "/adapters/none/rollback", {}, 404),
        ("POST", "/adapters/none/pin", {}, 404),
        ("POST", "/adapters/none/unload", {}, 404),
        ("DELETE", "/adapters/none/canary", None, 404),
        ("DELETE", "/adapters/none", None, 404),
        ("POST", "/adapters/none/alias", {"version": "a@000000"}, 404),
    ],
)
@in_a_loop
async def test_a_request_that_makes_no_sense_gets_its_status(world, method: str, path: str, body, status: int) -> None:
    async with world() as w:
        answer = await w.api.request(method, path, json=body)
        assert (answer.status_code, answer.json().get("error", {}).get("code", 404)) == (status, status)


@in_a_loop
async def test_an_adapter_is_unloaded_unless_it_is_pinned(world, write_lora) -> None:
    async with world() as w:
        await w.api.put("/adapters/a", json={"source": str(write_lora("one", 1.0))})
        assert (await w.api.post("/adapters/a/unload")).json()["version"]["residency"] == "disk"
        await w.api.post("/adapters/a/pin")
        assert w.loaded() == ["a"]
        assert (await w.api.post("/adapters/a/unload")).status_code == 409


@in_a_loop
async def test_a_server_is_taken_out_of_rotation_and_put_back(world) -> None:
    async with world() as w:
        assert (await w.api.post("/drain")).json() == {"drained": True, "running": 0}
        assert w.gateway.not_ready() == ["drained by an operator"]
        assert (await w.api.get("/requests")).json()["drained"] is True
        assert (await w.api.delete("/drain")).json()["drained"] is False
        assert w.gateway.not_ready() == []


@in_a_loop
async def test_vllms_own_calls_publish_and_remove(world, write_lora) -> None:
    async with world() as w:
        body = {"lora_name": "a", "lora_path": str(write_lora("one", 1.0))}
        assert (await w.api.post("/v1/load_lora_adapter", json=body)).status_code == 200
        assert w.current("a") is not None
        assert w.entry("a") is not None
        assert (await w.api.post("/v1/unload_lora_adapter", json={"lora_name": "a"})).status_code == 200
        assert w.current("a") is None
