"""What does not belong to a tenant does not exist for it, with a stand-in for handlers and engine.

tests/e2e asks the routes of the real engine.
"""

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from astra_serve.adapters.version import Alias, Version
from astra_serve.document.keys import Key, Keys, Tenant, hash_of
from astra_serve.gateway.middleware import Gateway, Served, Subscribers
from astra_serve.gateway.models import PATH, Models
from astra_serve.gateway.request import Request
from astra_serve.gateway.routes import SERVED
from astra_serve.gateway.tenancy.authentication import Authentication
from astra_serve.gateway.tenancy.keyring import Keyring
from tests.astra_serve.gateway.test_gateway import body_of, say
from tests.astra_serve.world import Memory, in_a_loop, memory

MINE = Tenant(name="me", keys=[Key(hash=hash_of("my-key"))], adapters=["mine/*", "shared"], pinned_versions=True)
PLAIN = Tenant(name="plain", keys=[Key(hash=hash_of("plain-key"))], adapters=["shared"])
THEIRS = Tenant(name="them", keys=[Key(hash=hash_of("their-key"))], adapters=["theirs/*", "shared"], base=True)
ROUTES = [path for path in (
    "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/embeddings", "/v1/score",
    "/v1/rerank", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v2/embed", "/v2/rerank", "/tokenize",
    "/detokenize", "/classify", "/pooling", "/score", "/rerank",
) if SERVED.fullmatch(path)]  # fmt: skip


@dataclass
class House:
    """A server with three tenants, and the requests that have ended."""

    memory: Memory
    ended: list[Request]
    versions: dict[str, Version]
    client: Callable[[str], httpx.AsyncClient]


@pytest.fixture
def house(engine, store, base, write_lora) -> Callable[[], AbstractAsyncContextManager[House]]:
    @asynccontextmanager
    async def make() -> AsyncIterator[House]:
        async def abort(_: set[str]) -> None: ...

        async def handler(_scope: Any, receive: Any, send: Any) -> None:
            await body_of(receive)
            await say(send, list(Served()))

        async with memory(engine, store, base, 4) as m:
            versions = {}
            for number, name in enumerate(("mine/a", "theirs/x", "shared"), 1):
                versions[name] = Version(name, store.add(write_lora(f"lora{number}", float(number))))
                m.fleet.point(name, Alias(versions[name]), 1)
            ended: list[Request] = []
            gateway = Gateway(handler, m.fleet, Subscribers(ended=[ended.append]), abort=abort, serves=lambda _: True)
            listed, models = FastAPI(), Models(m.fleet, 2048)
            listed.add_api_route(PATH, models.show_all, methods=["GET"])
            listed.add_api_route(PATH + "/{model:path}", models.show, methods=["GET"])

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await (gateway if scope["method"] == "POST" else listed)(scope, receive, send)

            keyring = Keyring(["operator"], follows=True)
            keyring.replace(Keys(tenants=[MINE, PLAIN, THEIRS]))
            transport = httpx.ASGITransport(Authentication(app, keyring))

            def client(key: str) -> httpx.AsyncClient:
                headers = {"Authorization": f"Bearer {key}"}
                return httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers)

            yield House(m, ended, versions, client)

    return make


def seen(answer: httpx.Response, model: str) -> tuple[int, str, list[tuple[str, str]]]:
    """Return an answer without the name that was asked for, and without what differs from request to request."""
    headers = [(k, re.sub(r"\d+", "", v)) for k, v in answer.headers.items() if k != "x-request-id"]
    return answer.status_code, answer.text.replace(model, "NAME"), headers


@pytest.mark.parametrize("route", ROUTES)
@in_a_loop
async def test_an_adapter_of_another_tenant_is_answered_as_one_that_does_not_exist(house, route: str) -> None:
    async with house() as h, h.client("my-key") as http:
        assert (await http.post(route, json={"model": "mine/a"})).json() == ["mine/a"]
        assert (await http.post(route, json={"model": h.versions["mine/a"].name})).status_code == 200
        h.ended.clear()
        digest = h.versions["theirs/x"].name.partition("@")[2]
        for hidden, absent in (
            ("theirs/x", "theirs/y"),
            (f"theirs/x@{digest}", f"theirs/y@{digest}"),
            (h.memory.fleet.base_name, "x" * len(h.memory.fleet.base_name)),
        ):
            answers = [seen(await http.post(route, json={"model": model}), model) for model in (hidden, absent)]
            assert answers[0] == answers[1]
            assert answers[0][0] == 404
            assert "theirs" not in answers[0][1]
        assert (await http.post(route, json={})).status_code == 404  # without a model a request is the base's
        assert {request.adapter for request in h.ended} == {None}
        assert h.memory.fleet.requests["theirs/x"] == Counter()
        assert h.memory.fleet.residency.of(h.versions["theirs/x"]).leases == set()


@in_a_loop
async def test_models_of_others_are_neither_listed_nor_shown(house, base) -> None:
    async with house() as h:
        for key, names in (
            ("my-key", {"mine/a", "shared"}),
            ("plain-key", {"shared"}),
            ("their-key", {base.name, "theirs/x", "shared"}),
            ("operator", {base.name, "mine/a", "theirs/x", "shared"}),
        ):
            async with h.client(key) as http:
                assert {card["id"] for card in (await http.get(PATH)).json()["data"]} == names
                for name in (base.name, *h.versions):
                    assert (await http.get(f"{PATH}/{name}")).status_code == (200 if name in names else 404)
        async with h.client("my-key") as http:
            shown = [seen(await http.get(f"{PATH}/{name}"), name) for name in ("theirs/x", "theirs/y")]
            assert shown[0] == shown[1]


@in_a_loop
async def test_a_tenant_without_the_right_asks_for_no_pinned_version(house) -> None:
    async with house() as h:
        pinned = h.versions["shared"].name
        for key, status in (("my-key", 200), ("plain-key", 404)):
            async with h.client(key) as http:
                answer = await http.post("/v1/completions", json={"model": pinned})
                assert answer.status_code == status
        assert pinned not in answer.json()["error"]["message"].replace(repr(pinned), "", 1)
        assert "did you mean 'shared'?" in answer.json()["error"]["message"]


@in_a_loop
async def test_a_hidden_name_takes_the_same_path_through_the_code_as_an_absent_one(house) -> None:
    """As many calls of functions: an answer that takes longer would tell that the name exists."""

    async def calls(http: httpx.AsyncClient, model: str) -> int:
        counted = 0

        def count(_frame: Any, event: str, _arg: Any) -> None:
            nonlocal counted
            counted += event == "call"

        await asyncio.sleep(0)
        sys.setprofile(count)
        try:
            await http.post("/v1/completions", content=json.dumps({"model": model}))
        finally:
            sys.setprofile(None)
        return counted

    async with house() as h, h.client("my-key") as http:
        models = ("theirs/x", "theirs/y")
        found = [{await calls(http, model) for _ in range(5)} for model in models]
        assert found[0] & found[1], "another number of calls in each of five requests"
        async with h.client("their-key") as other:
            assert not {await calls(other, "theirs/x") for _ in range(5)} & found[0]


@in_a_loop
async def test_the_official_client_raises_its_errors(house) -> None:
    async with house() as h:
        for key, model, error in (
            ("no-key", "mine/a", openai.AuthenticationError),
            ("my-key", "theirs/x", openai.NotFoundError),
        ):
            async with h.client(key) as http:
                client = openai.AsyncOpenAI(base_url="http://x/v1", api_key=key, http_client=http, max_retries=0)
                with pytest.raises(error) as raised:
                    await client.completions.create(model=model, prompt="x")
                assert isinstance(raised.value.body, dict)
                assert {"message", "type", "param", "code"} <= raised.value.body.keys()


@in_a_loop
async def test_a_tenant_without_the_right_reads_no_metrics(house) -> None:
    async with house() as h, h.client("my-key") as http, h.client("no-key") as nobody:
        refused = await http.get("/metrics")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, 403)
        assert (await nobody.get("/metrics")).status_code == 401
        assert (await nobody.get("/health")).status_code != 401
