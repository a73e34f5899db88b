"""The admin API's own promises: its token, its errors, and the routes that change no document."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.astra_serve.world import TOKEN, in_a_loop


@in_a_loop
async def test_every_route_wants_the_token(world) -> None:
    async with world() as w:
        routes = [route for route in w.admin_app.routes if getattr(route, "methods", None)]
        assert len(routes) > 15
        for route in routes:
            for method in route.methods - {"HEAD"}:  # whose answer has no body
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


@in_a_loop
async def test_a_body_is_not_read_without_the_token(world) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body is read")
        yield b""

    async with world() as w:
        for header in ({"Authorization": "Bearer wrong"}, {"Authorization": "Bearer wrong\xe9".encode("latin-1")}):
            answer = await w.api.put("/adapters/a", content=body(), headers=header)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError")


@in_a_loop
async def test_a_body_has_a_size_also_without_a_length(world) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield 100_000 * b" "

    async with world() as w:
        for content in (2_000_000 * b" ", pieces()):
            answer = await w.api.put("/adapters/a", content=content, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (413, "RequestTooLargeError")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/adapters/a/canary", b'{"source": "x", "weight": NaN}', 400),
        ("POST", "/adapters/a/canary", b'{"source": "x", "weight": 1e999}', 400),
        ("PUT", "/adapters/a", rb'{"source": "\ud800"}', 400),
        ("PUT", "/adapters/a", rb'{"source": "x", "\ud800": 1}', 400),
        ("PUT", "/adapters/a", b"{", 400),
        ("PUT", "/adapters/a", b"[" * 100_000, 400),
        ("PUT", "/adapters/a", b'{"source": ' + b"9" * 5000 + b"}", 400),
        ("PUT", "/adapters/a", b'{"source": "x", "digest": "x"}', 400),
        ("GET", "/none", b"", 404),
        ("PATCH", "/adapters/a", b"{}", 405),
    ],
)
@in_a_loop
async def test_every_error_has_openais_form(world, method: str, path: str, body: bytes, status: int) -> None:
    async with world() as w:
        answer = await w.api.request(method, path, content=body, headers={"Content-Type": "application/json"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, status)
        assert set(error) == {"message", "type", "param", "code"}
        assert not set("\n^$") & set(error["message"])


@in_a_loop
async def test_a_failure_of_the_server_has_openais_form_too(world, monkeypatch) -> None:
    async with world() as w:

        async def fails() -> None:
            raise RuntimeError("a secret")

        monkeypatch.setattr(w.control, "refresh", fails)
        transport = httpx.ASGITransport(w.admin_app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=w.api.headers) as http:
            answer = await http.post("/refresh")
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        assert "secret" not in answer.text
