"""Requests to the real server that ask for too much, or for what the engine cannot do."""

from typing import Any

import httpx
import pytest

from tests.support.server import Server

pytestmark = pytest.mark.timeout(500)  # the first test of the session starts the server, too
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
SAID = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def grammar(**kind: Any) -> dict[str, Any]:
    return {"prompt": "x", "max_tokens": 2, "structured_outputs": kind}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (TEXT, {"prompt": "x" * 9_000_000}, 413),
        (TEXT, {"prompt": "x", "n": 129}, 400),
        (TEXT, {"prompt": "x", "n": 129, "use_beam_search": True}, 400),
        (TEXT, {"prompt": ["x"] * 513}, 400),
        (TEXT, {"prompt": "x", "priority": -(10**26)}, 400),
        ("/tokenize", {"prompt": "x" * 1_000_000}, 400),
        ("/v1/responses", {"input": [{}] * 2000}, 400),
        (TEXT, grammar(json={"$ref": "#"}), 400),
        (TEXT, grammar(grammar="root ::= ("), 400),
        (TEXT, grammar(grammar='root ::= root "a"'), 400),  # compiles, and allows no text
        (TEXT, grammar(json={"type": "array", "uniqueItems": True, "maxItems": 10**9}), 400),
        (TEXT, grammar(grammar="x" * 70_000), 400),
        (CHAT, {**SAID, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400),
        ("/generative_scoring", {}, 404),
        ("/v1/completions/render", {"prompt": "x"}, 404),
        ("/nonsense", {}, 404),
    ],
)
def test_too_much_is_refused_in_openais_form(server: Server, path: str, body: dict[str, Any], status: int) -> None:
    answer = httpx.post(server.url + path, json={"model": "base", **body}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status), answer.text
    assert httpx.post(server.url + TEXT, json={"model": "base", "prompt": "x", "max_tokens": 1}).is_success


def test_a_client_sets_no_priority_and_opens_no_websocket(server: Server) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    for value in ("-100", "-" + "9" * 26):
        assert httpx.post(server.url + TEXT, json=body, headers={"X-Vllm-Priority": value}).is_success
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    answer = httpx.get(
        f"{server.url}/v1/realtime", headers={**upgrade, "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)
