"""Which routes are served, and what the others answer."""

import httpx
import pytest
from fastapi import FastAPI, WebSocket

from astra_serve.gateway.routes import RouteErrors, served
from tests.astra_serve.world import in_a_loop

SERVED = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses/{response_id}/cancel",
    "/v1/messages/count_tokens",
    "/v1/models/{model:path}",
    "/v2/rerank",
    "/tokenize",
    "/metrics",
    "/ping",
]
REMOVED = [
    "/v1/completions/render",
    "/v1/audio/transcriptions",
    "/v1/load_lora_adapter",
    "/inference/v1/generate",
    "/generative_scoring",
    "/invocations",
    "/abort_requests",
    "/update_weights",
    "/collective_rpc",
    "/start_profile",
    "/docs",
    "/v1",
    "/x/tokenize",
]


@pytest.fixture
def app() -> FastAPI:
    found = FastAPI()

    async def answer() -> str:
        return "served"

    async def listen(socket: WebSocket) -> None:
        await socket.accept()

    for path in (*SERVED, *REMOVED):
        found.add_api_route(path, answer, methods=["POST"])
    found.add_api_websocket_route("/v1/realtime", listen)
    found.router.routes[:] = served(found.router.routes)
    found.router.middleware_stack = RouteErrors(found.router.middleware_stack)  # type: ignore[method-assign]
    return found


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


@in_a_loop
async def test_only_the_routes_of_the_list_are_served(app: FastAPI) -> None:
    async with client(app) as http:
        for path in SERVED:
            assert (await http.post(path)).json() == "served"
        for path in REMOVED:
            answer = await http.post(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
        assert (await http.get("/docs")).status_code == 404
        assert set((await http.get("/openapi.json")).json()["paths"]) == {
            *SERVED[:4],
            "/v1/models/{model}",
            *SERVED[5:],
        }


@in_a_loop
async def test_another_method_gets_405(app: FastAPI) -> None:
    async with client(app) as http:
        answer = await http.put("/tokenize")
        assert (answer.status_code, answer.json()["error"]["type"]) == (405, "MethodNotAllowedError")
        assert "PUT /tokenize is not served" in answer.json()["error"]["message"]


@in_a_loop
async def test_a_websocket_is_closed_before_it_is_accepted(app: FastAPI) -> None:
    sent = []

    async def send(message) -> None:
        sent.append(message["type"])

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": b"", "subprotocols": []}
    await app(scope, None, send)  # type: ignore[arg-type]
    assert sent == ["websocket.close"]
