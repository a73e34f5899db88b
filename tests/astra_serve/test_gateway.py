"""What handlers see of a request's adapter, with a stand-in for handlers and engine."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from astra_serve.fleet import Fleet
from astra_serve.gateway import Gateway, Served
from astra_serve.version import Alias
from tests.astra_serve.test_fleet import in_a_loop


@pytest.fixture
def fleet(engine, store, base, write_lora) -> Fleet:
    found = Fleet(engine, store, base, 2, wait_s=0.1)
    found.point("a", Alias(found.version("a", store.add(write_lora("one", 1.0)))), 1)
    return found


def client(fleet: Fleet, handler: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(Gateway(fleet).around(handler)), base_url="http://x")


async def say(send: Any, content: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def body_of(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message.get("more_body", False)
    return b"".join(parts)


@in_a_loop
async def test_a_handler_finds_the_version_under_the_name_that_was_asked_for_and_no_other(fleet) -> None:
    served = Served()

    async def handler(_scope, receive, send) -> None:
        asked = json.loads(await body_of(receive))["model"]
        assert list(served) == ([asked] if asked.startswith("a") else [])
        assert "other" not in served
        await say(send, served.get(asked))

    async with client(fleet, handler) as http:
        version = fleet.aliases["a"].current.name
        for model, expected in (("a", version), (version, version), ("none", None)):
            assert (await http.post("/v1/completions", json={"model": model})).json() == expected
    assert list(served) == []


@in_a_loop
async def test_the_lease_lasts_until_the_response_has_ended_whatever_the_end(fleet) -> None:
    version = fleet.aliases["a"].current

    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        assert len(version.requests) == 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.sleep(0.01)
        assert len(version.requests) == 1
        if scope["path"] == "/breaks":
            raise RuntimeError("broken")
        await send({"type": "http.response.body", "body": b"y"})

    async with client(fleet, handler) as http:
        assert (await http.post("/v1", json={"model": "a"})).text == "xy"
        assert not version.requests
        with pytest.raises(RuntimeError):
            await http.post("/breaks", json={"model": "a"})
        assert not version.requests
        gone = asyncio.create_task(http.post("/v1", json={"model": "a"}))
        await asyncio.sleep(0.005)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
    assert not version.requests


@in_a_loop
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b'{"model": 3}', b"[" * 100_000, b"\xff"])
async def test_a_body_without_a_model_reaches_the_handler_as_it_is(fleet, body: bytes) -> None:
    async def handler(_scope, receive, send) -> None:
        assert await body_of(receive) == body
        assert list(Served()) == []
        await say(send, "seen")

    async with client(fleet, handler) as http:
        assert (await http.post("/v1/completions", content=body)).json() == "seen"


@in_a_loop
async def test_an_adapter_that_cannot_be_served_now_gets_openais_error_and_when_to_try_again(fleet, engine) -> None:
    async def handler(*_: Any) -> None:
        raise AssertionError("it must not get this far")

    async with client(fleet, handler) as http:
        fleet.expected.add("later")
        answer = await http.post("/v1/completions", json={"model": "later"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["message"] == "later is not served yet"
        engine.refuse = {"a"}
        answer = await http.post("/v1/completions", json={"model": "a"})
        assert answer.status_code == 503
        assert "retry-after" not in answer.headers
        assert "the engine cannot load it" in answer.json()["error"]["message"]


@in_a_loop
async def test_nobody_gets_ahead_of_others_by_asking_for_it(fleet) -> None:
    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        await say(send, "seen")

    async with client(fleet, handler) as http:
        assert (await http.post("/v1/completions", json={"model": "a", "priority": 0})).status_code == 200
        answer = await http.post("/v1/completions", json={"model": "a", "priority": -9})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "priority"
