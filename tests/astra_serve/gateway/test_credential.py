"""The credential of a port: with which headers a request passes."""

from base64 import b64encode

import httpx
import pytest

from astra_serve.gateway.credential import Credential
from tests.astra_serve.gateway.test_gateway import say
from tests.astra_serve.world import in_a_loop


def basic(text: str) -> str:
    return f"Basic {b64encode(text.encode()).decode()}"


async def behind(_scope, _receive, send) -> None:
    await say(send, "let in")


def client(**settings: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Credential(behind, "the-token"))
    return httpx.AsyncClient(transport=transport, base_url="http://x", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", "the-token", "Basic", "Basic ?", basic("the-token"), basic("the-token:x"), "X y"],
)
@in_a_loop
async def test_without_the_token_every_path_answers_401_in_openais_form(header: str) -> None:
    async with client(headers={"Authorization": header}) as http:
        for path in ("/health", "/v1/models", "/v1/load_lora_adapter", "/none"):
            answer = await http.post(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError")
            assert "the-token" not in answer.text


@pytest.mark.parametrize("header", ["Bearer the-token", "bearer the-token", basic("x:the-token"), basic(":the-token")])
@in_a_loop
async def test_the_token_is_a_bearer_or_the_password_of_any_user(header: str) -> None:
    async with client(headers={"Authorization": header}) as http:
        assert (await http.get("/health")).json() == "let in"


def test_a_port_cannot_be_opened_without_a_token() -> None:
    with pytest.raises(ValueError, match="cannot be empty"):
        Credential(behind, "")
