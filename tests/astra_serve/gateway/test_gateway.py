"""What handlers see of a request's adapter, with a stand-in for handlers and engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.version import Alias
from astra_serve.gateway import request as requests
from astra_serve.gateway.middleware import Gateway, Served
from astra_serve.gateway.request import Request
from tests.astra_serve.adapters.test_fleet import in_a_loop


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


@asynccontextmanager
async def ended(fleet: Fleet, handler: Any) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient, list[Request]]]:
    """Yield a gateway, a client in front of it, and the requests that have ended."""
    gateway, found = Gateway(fleet), []
    gateway.ended.append(found.append)
    transport = httpx.ASGITransport(gateway.around(handler), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        yield gateway, http, found


@in_a_loop
async def test_every_request_ends_with_its_id_its_version_and_its_outcome(fleet) -> None:
    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        if scope["path"] == "/breaks":
            raise RuntimeError("broken")
        await say(send, {}, status=int(scope["path"][1:]))

    async with ended(fleet, handler) as (_, http, found):
        for path, model, outcome in (
            ("/200", "a", "ok"),
            ("/200", "base", "ok"),
            ("/404", "none", "client_error"),
            ("/500", "a", "server_error"),
            ("/breaks", "a", "server_error"),
        ):
            await http.post(path, json={"model": model})
            assert (found[-1].outcome, found[-1].model) == (outcome, model)
            assert (found[-1].version is not None) == (model == "a")
            assert found[-1].adapter == ("a" if model == "a" else None)
        assert len({request.id for request in found}) == len(found)


@in_a_loop
async def test_a_request_keeps_the_id_that_its_client_gives_and_the_handlers_know_it(fleet) -> None:
    seen = []

    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        seen.append(dict(scope["headers"])[b"x-request-id"].decode())
        await say(send, {})

    async with ended(fleet, handler) as (_, http, found):
        for given, kept in (("mine-1", True), ("with space", False), ("x" * 200, False), (None, False)):
            headers = {} if given is None else {"X-Request-Id": given}
            answer = await http.post("/v1", json={"model": "a"}, headers=headers)
            assert answer.headers["x-request-id"] == seen[-1] == found[-1].id
            assert (found[-1].id == given) is kept


@in_a_loop
async def test_who_leaves_before_the_end_counts_as_cancelled(fleet) -> None:
    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        assert (await receive())["type"] == "http.disconnect"
        await say(send, None)  # as vLLM's handlers, to nobody

    messages = iter([{"type": "http.request", "body": b'{"model": "a"}'}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(_: Any) -> None: ...

    gateway, found = Gateway(fleet), []
    gateway.ended.append(found.append)
    await gateway.around(handler)({"type": "http", "method": "POST", "path": "/v1", "headers": []}, receive, send)
    assert found[0].outcome == "cancelled"


@in_a_loop
async def test_a_closed_gateway_lets_nobody_in_and_waits_for_those_who_are(fleet) -> None:
    go_on = asyncio.Event()

    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        await go_on.wait()
        await say(send, "whole")

    async with ended(fleet, handler) as (gateway, http, _):
        running = asyncio.create_task(http.post("/v1", json={"model": "a"}))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(gateway.close("the server is shutting down", finish_s=5))
        await asyncio.sleep(0.01)
        refused = await http.post("/v1", json={"model": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["message"].startswith("the server is shutting down")
        assert gateway.not_ready() == ["the server is shutting down"]
        assert not closing.done()
        go_on.set()
        assert (await running).json() == "whole"
        await closing


@in_a_loop
async def test_who_has_not_finished_at_the_deadline_gets_an_error_that_clients_understand(fleet) -> None:
    begun = []

    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        if scope["path"] == "/stream":
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        begun.append(scope["path"])
        await asyncio.sleep(60)

    async with ended(fleet, handler) as (gateway, http, found):
        running = [asyncio.create_task(http.post(path, json={"model": "a"})) for path in ("/whole", "/stream")]
        while len(begun) < len(running):
            await asyncio.sleep(0.01)
        await gateway.close("the server is shutting down", finish_s=0.05)
        whole, stream = await asyncio.gather(*running)
        assert whole.status_code == 503
        assert "was not finished before the deadline" in whole.json()["error"]["message"]
        *_, last = stream.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
        assert not gateway.running
        assert [(request.outcome, request.complete) for request in found] == [("server_error", True)] * 2
        await gateway.close("again", finish_s=0)  # nobody is left


@in_a_loop
async def test_what_the_engine_computes_for_a_request_ends_before_its_version_may_leave(fleet) -> None:
    """A cancelled handler of vLLM's leaves a task behind that goes on computing."""
    version, aborted = fleet.aliases["a"].current, []
    stop = asyncio.Event()

    async def compute(request: Request) -> None:
        with request.computes("engine-1"):
            await stop.wait()

    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        left_behind.append(asyncio.create_task(compute(requests.current.get())))
        await asyncio.sleep(0)
        await say(send, "x")

    async def abort(ids: set[str]) -> None:
        aborted.append(ids)
        assert version.requests
        stop.set()

    left_behind: list[asyncio.Task] = []
    async with ended(fleet, handler) as (gateway, http, _):
        gateway.abort = abort
        await http.post("/v1", json={"model": "a"})
        assert aborted == [{"engine-1"}]
        assert left_behind[0].done()
        assert not version.requests


@in_a_loop
async def test_prompt_logprobs_are_refused_where_the_engine_would_give_wrong_ones(fleet) -> None:
    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        await say(send, "seen")

    async with ended(fleet, handler) as (_, http, _):
        body = {"model": "a", "prompt_logprobs": 1}
        assert (await http.post("/v1", json=body)).status_code == 200
        fleet.aliases["a"].current.adapts_head = True
        assert (await http.post("/v1", json=body)).status_code == 400
        assert (await http.post("/v1", json={"model": "a"})).status_code == 200


@in_a_loop
async def test_what_is_no_request_to_a_model_loads_nothing(fleet, engine) -> None:
    """vLLM guards certain paths with its API keys: on others nobody has shown one."""

    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        await say(send, list(Served()))

    async with ended(fleet, handler) as (gateway, http, found):
        gateway.serves = lambda scope: scope["path"].startswith("/v1")
        assert (await http.post("/nonsense", json={"model": "a"})).json() == []
        assert not engine.loaded
        assert not found
        assert (await http.post("/v1/completions", json={"model": "a"})).json() == ["a"]


@in_a_loop
async def test_a_request_without_a_model_is_the_bases_and_no_less_a_request(fleet, base) -> None:
    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        await say(send, {})

    async with ended(fleet, handler) as (_, http, found):
        await http.post("/v1/completions", json={"prompt": "x"})
        assert (found[-1].model, found[-1].adapter, found[-1].outcome) == (base.name, None, "ok")
        assert (await http.post("/v1/completions", json={"prompt": "x", "priority": -1})).status_code == 400
