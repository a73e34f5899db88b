"""Who is let in, with a stand-in for the application behind; tests/e2e asks the real one."""

import json

import httpx
import pytest
from starlette.datastructures import Headers

from astra_serve.gateway.middleware import OPEN
from astra_serve.gateway.tenancy import caller
from astra_serve.gateway.tenancy.authentication import Authentication
from astra_serve.gateway.tenancy.keyring import Keyring
from tests.astra_serve.adapters.test_fleet import in_a_loop
from tests.astra_serve.gateway.test_gateway import say

KEYS = Keyring(["first-key", "second-key"])


async def behind(_scope, _receive, send) -> None:
    await say(send, "let in")


def client(**headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(Authentication(behind, KEYS)), base_url="http://x", headers=headers
    )


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/tokenize", "/docs", "/", "//health", "/health/", "/health/../v1", "/healthz"]
)
@in_a_loop
async def test_without_a_key_every_path_answers_401_in_openais_form(path: str) -> None:
    for header in ({}, {"Authorization": "first-key"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong"}):
        async with client(**header) as http:
            answer = await http.post(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "AuthenticationError"
            assert "first-key" not in answer.text


@pytest.mark.parametrize("header", ["Bearer first-key", "bearer second-key"])
@in_a_loop
async def test_each_of_several_keys_is_accepted(header: str) -> None:
    async with client(Authorization=header) as http:
        assert (await http.post("/v1/completions")).json() == "let in"


@in_a_loop
async def test_state_paths_and_preflight_requests_need_no_key() -> None:
    async with client() as http:
        for path in OPEN:
            assert (await http.get(path)).json() == "let in"
        assert (await http.options("/v1/completions")).json() == "let in"


@in_a_loop
async def test_a_websocket_without_a_key_is_closed() -> None:
    sent = []

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await Authentication(behind, KEYS)(scope, None, send)
    assert json.dumps(sent) == '[{"type": "websocket.close", "code": 1008}]'


def salt(keyring: Keyring, key: str) -> str | None:
    found = keyring.caller(Headers({"Authorization": f"Bearer {key}"}))
    assert found is not None
    return found.cache_salt


def test_each_of_several_keys_has_a_salt_of_its_own_that_only_this_process_knows() -> None:
    one, other = Keyring(["one", "two"]), Keyring(["one", "two"])
    assert salt(one, "one") == salt(one, "one")
    assert len({salt(one, "one"), salt(one, "two"), salt(other, "one")}) == 3


@pytest.mark.parametrize("keys", [["one"], ["one", "one"]])
def test_one_key_has_no_salt(keys: list[str]) -> None:
    assert salt(Keyring(keys), "one") is None


def test_without_keys_everybody_has_everything() -> None:
    assert Keyring([]).caller(Headers()) == caller.EVERYTHING
