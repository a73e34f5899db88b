"""The limits as clients see them: the gateway with keys and limits over HTTP; a stand-in for the engine answers."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from astra_serve.adapters.version import Alias, Version
from astra_serve.document import keys
from astra_serve.gateway import request as requests
from astra_serve.gateway.middleware import Gateway, Subscribers
from astra_serve.gateway.tenancy.authentication import Authentication
from astra_serve.gateway.tenancy.keyring import Keyring
from astra_serve.gateway.tenancy.quota.station import Quota
from astra_serve.gateway.tenancy.quota.store import MemoryStore
from astra_serve.gateway.tenancy.station import Stations
from tests.astra_serve.gateway.test_gateway import body_of
from tests.astra_serve.world import in_a_loop, memory

KEY = "a-key-of-team"
HEADERS = [f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")]
CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}  # 1 + 10 tokens


def document(**limits: int) -> keys.Keys:
    """Return a document whose one tenant may use `a`, within limits."""
    team = {"name": "team", "keys": [{"hash": keys.hash_of(KEY)}], "adapters": ["a"], "limits": limits}
    return keys.Keys.model_validate({"tenants": [team]})


@dataclass
class StandInHandler:
    """Answers chats with `output` tokens, at the latest when `go_on` is set."""

    output: int = 4
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        asked = json.loads(await body_of(receive))
        self.calls += 1
        self.began.set()
        await self.go_on.wait()
        request = requests.current.get()
        assert request is not None
        request.prompt_tokens, request.output_tokens = 2, self.output
        message = {"role": "assistant", "content": "yes"}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "a"}
        kind, content = b"application/json", json.dumps({**answer, "choices": [{**choice, "message": message}]})
        if asked.get("stream"):
            kind = b"text/event-stream"
            chunk = {**answer, "object": "chat.completion.chunk", "choices": [{**choice, "delta": message}]}
            content = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": content.encode()})


@dataclass
class Site:
    url: str
    http: httpx.AsyncClient
    keyring: Keyring
    handler: StandInHandler
    ended: list[requests.Request]

    def client(self, max_retries: int) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=max_retries)

    async def chat(self, **changes: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json={**CHAT, **changes})


@pytest.fixture
def site(engine, store, base, write_lora) -> Callable[..., AbstractAsyncContextManager[Site]]:
    async def abort(_: set[str]) -> None:
        raise AssertionError("no engine works for these requests")

    @asynccontextmanager
    async def make(**limits: int) -> AsyncIterator[Site]:
        async with memory(engine, store, base) as m:
            m.fleet.point("a", Alias(Version("a", store.add(write_lora("one", 1.0)))), 1)
            handler, ended = StandInHandler(), list[requests.Request]()
            handler.go_on.set()
            stations = Stations(quota=Quota(MemoryStore()).station)
            subscribers = Subscribers(ended=[ended.append])
            gateway = Gateway(
                handler, m.fleet, subscribers, abort=abort, serves=lambda _: True, stations=stations
            )  # fmt: skip
            keyring = Keyring(["everything"], follows=True)
            keyring.replace(document(**limits))
            async with over_http(Authentication(gateway, keyring)) as url:
                headers = {"Authorization": f"Bearer {KEY}"}
                async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
                    yield Site(url, http, keyring, handler, ended)

    return make


@asynccontextmanager
async def over_http(app: Any) -> AsyncIterator[str]:
    """Serve an application on a port of this machine while the block runs."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


LIMITS = {"requests_per_minute": 1000, "tokens_per_minute": 10_000}


@in_a_loop
async def test_every_answer_of_a_limited_tenant_has_openais_headers(site) -> None:
    async with site(**LIMITS) as s:
        answers = {
            200: await s.chat(),
            "stream": await s.chat(stream=True),
            404: await s.chat(model="unknown"),
            400: await s.http.post("/v1/chat/completions", content=b'{"model": "a", "n": 1000}'),
            429: await s.chat(max_tokens=20_000),
        }
        for status, answer in answers.items():
            assert answer.status_code == (200 if status == "stream" else status)
            assert set(HEADERS) <= set(answer.headers), status
            assert re.fullmatch(r"(\d+m)?\d+s", answer.headers["x-ratelimit-reset-tokens"])
        assert answers[200].headers["x-ratelimit-limit-requests"] == "1000"
        assert answers[200].headers["x-ratelimit-remaining-requests"] == "999"
        assert answers[200].headers["x-ratelimit-limit-tokens"] == "10000"
        assert answers[200].headers["x-ratelimit-remaining-tokens"] == str(10_000 - 11)


@in_a_loop
async def test_without_limits_there_are_no_headers_and_no_refusals(site) -> None:
    async with site(default_max_tokens=1) as s:
        for headers in ({}, {"Authorization": "Bearer everything"}):
            answer = await s.http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200
            assert not set(HEADERS) & set(answer.headers)


@in_a_loop
async def test_a_request_that_has_ended_is_charged_for_the_tokens_that_it_has_used(site) -> None:
    async with site(tokens_per_day=1000) as s:
        s.handler.output = 4
        await s.chat(max_tokens=500)  # of which 2 + 4 are used
        await s.chat(model="unknown", max_tokens=500)
        await s.http.post("/v1/chat/completions", content=b"{")
        answer = await s.chat(max_tokens=100)
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - 6 - 101)


@in_a_loop
async def test_a_client_that_disconnects_gives_back_its_place_and_its_tokens(site) -> None:
    async with site(requests_at_a_time=1, tokens_per_day=1000) as s:
        s.handler.go_on.clear()
        leaving = asyncio.create_task(s.chat(max_tokens=500))
        await s.handler.began.wait()
        assert (await s.chat()).status_code == 429
        leaving.cancel()
        s.handler.go_on.set()
        while len(s.ended) < 2:
            await asyncio.sleep(0.01)
        answer = await s.chat(max_tokens=100)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - 6 - 101)


@in_a_loop
async def test_a_refused_request_reaches_no_handler_and_is_a_rate_limit_error_of_openais_client(site) -> None:
    async with site(tokens_per_minute=20) as s:
        assert (await s.chat(max_tokens=15)).status_code == 200
        async with s.client(max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as refused:
                await client.chat.completions.create(**{**CHAT, "max_tokens": 19})
        assert s.handler.calls == 1
        error = refused.value
        assert (error.code, error.type, error.param) == ("rate_limit_exceeded", "tokens", None)
        assert "20 tokens per minute" in error.message
        assert 1 <= int(error.response.headers["retry-after"]) <= 120


@in_a_loop
async def test_openais_client_waits_for_retry_after_and_then_succeeds(site) -> None:
    async with site(requests_at_a_time=1) as s:
        s.handler.go_on.clear()
        first = asyncio.create_task(s.chat())
        await s.handler.began.wait()
        async with s.client(max_retries=1) as client:
            begun = time.monotonic()
            second = asyncio.create_task(client.chat.completions.create(**CHAT))
            while not s.ended:  # the refusal
                await asyncio.sleep(0.01)
            assert (s.ended[0].status, s.handler.calls) == (429, 1)
            s.handler.go_on.set()
            assert (await first).status_code == 200
            assert (await second).choices[0].message.content == "yes"
            assert time.monotonic() - begun >= 1  # its own first wait would be half a second at most


@in_a_loop
async def test_a_request_larger_than_the_whole_limit_is_refused_and_not_sent_again(site) -> None:
    async with site(tokens_per_minute=20) as s, s.client(max_retries=5) as client:
        with pytest.raises(openai.RateLimitError, match="ask for fewer tokens") as refused:
            await client.chat.completions.create(**{**CHAT, "max_tokens": 20})
        assert "retry-after" not in refused.value.response.headers
        assert len(s.ended) == 1


@in_a_loop
async def test_a_changed_document_holds_for_the_next_request(site) -> None:
    async with site(tokens_per_minute=20) as s:
        assert (await s.chat(max_tokens=50)).status_code == 429
        s.keyring.replace(document(tokens_per_minute=100))
        answer = await s.chat(max_tokens=50)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-tokens"] == "100"
        s.keyring.replace(document())
        assert "x-ratelimit-limit-tokens" not in (await s.chat()).headers
