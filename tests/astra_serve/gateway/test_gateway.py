"""Requests, and the versions that handlers see for them, with a stand-in for handlers and engine."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from astra_serve.adapters.version import Alias, Version
from astra_serve.gateway import request as requests
from astra_serve.gateway.middleware import Gateway, Served, Subscribers
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.places import Places
from astra_serve.gateway.tenancy.station import OPEN_STATIONS, Stations
from tests.astra_serve.world import Memory, in_a_loop, memory, quiet

SCOPE = {"type": "http", "method": "POST", "path": "/v1", "headers": []}
Front = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, Memory, Gateway, list[Request]]]]


@pytest.fixture
def front(engine, store, base, write_lora) -> Front:
    """Return a gateway before a handler, over a memory whose `a` is an adapter.

    It yields a client, the memory, the gateway and the requests that have ended.
    """

    async def abort(_: set[str]) -> None:
        raise AssertionError("the engine computes nothing for these requests")

    @asynccontextmanager
    async def make(
        handler: Any, abort: Any = abort, serves: Any = lambda _: True, stations: Stations = OPEN_STATIONS
    ) -> AsyncIterator[Any]:
        async with memory(engine, store, base) as m:
            m.fleet.point("a", Alias(Version("a", store.add(write_lora("one", 1.0)))), 1)
            ended: list[Request] = []
            subscribers = Subscribers(ended=[ended.append])
            gateway = Gateway(handler, m.fleet, subscribers, abort=abort, serves=serves, stations=stations)
            transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
                yield http, m, gateway, ended

    return make


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


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """A handler that answers with the adapter of the request."""
    await body_of(receive)
    await say(send, list(Served()))


@in_a_loop
async def test_a_handler_finds_the_version_under_the_name_of_the_request_and_no_other(front, base) -> None:
    served = Served()

    async def handler(_scope, receive, send) -> None:
        asked = json.loads(await body_of(receive))["model"]
        assert list(served) == ([asked] if asked.startswith("a") else [])
        assert len(served) == len(list(served))
        assert "other" not in served
        await say(send, served.get(asked))

    async with front(handler) as (http, m, _, _):
        version = m.fleet.aliases["a"].current.name
        for model, expected in (("a", version), (version, version), (base.name, None)):
            assert (await http.post("/v1/completions", json={"model": model})).json() == expected
    assert list(served) == []


@in_a_loop
async def test_the_lease_lasts_until_the_response_has_ended_in_any_way(front) -> None:
    leases: list[int] = []

    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        leases.append(len(residence.leases))
        started.set()
        if scope["path"] == "/breaks":
            raise RuntimeError("broken")
        if scope["path"] == "/hangs":
            await asyncio.Event().wait()
        await send({"type": "http.response.body", "body": b"y"})

    started = asyncio.Event()
    async with front(handler) as (http, m, _, _):
        residence = m.residence(m.fleet.aliases["a"].current)
        assert (await http.post("/v1", json={"model": "a"})).text == "xy"
        assert not residence.leases
        await http.post("/breaks", json={"model": "a"})
        assert not residence.leases
        started.clear()
        cancelled = asyncio.create_task(http.post("/hangs", json={"model": "a"}))
        await started.wait()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert not residence.leases
    assert leases == [1, 1, 1]


@in_a_loop
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b'{"model": 3}', b'{"model": ""}'])
async def test_a_body_without_a_model_reaches_the_handler_unchanged(front, body: bytes) -> None:
    async def handler(_scope, receive, send) -> None:
        assert await body_of(receive) == body
        assert list(Served()) == []
        await say(send, "seen")

    async with front(handler) as (http, _, _, _):
        assert (await http.post("/v1/completions", content=body)).json() == "seen"


@in_a_loop
async def test_a_body_that_arrives_in_pieces_is_read_as_a_whole(front) -> None:
    body, seen = b'{"model": "a", "prompt": "x"}', []
    messages = iter({"type": "http.request", "body": bytes([one]), "more_body": True} for one in body)

    async def receive() -> Any:
        return next(messages, {"type": "http.request", "body": b"", "more_body": False})

    async def handler(_scope, receive, _send) -> None:
        seen.append((await body_of(receive), list(Served())))

    async with front(handler) as (_, _, gateway, _):
        await gateway(dict(SCOPE), receive, None)
        assert seen == [(body, ["a"])]


@in_a_loop
async def test_an_adapter_that_cannot_be_served_now_gets_openais_error_and_when_to_try_again(front, engine) -> None:
    async def handler(*_: Any) -> None:
        raise AssertionError("it must not get this far")

    async with front(handler) as (http, m, _, _):
        m.fleet.expected.add("later")
        answer = await http.post("/v1/completions", json={"model": "later"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["message"] == "later is not served yet"
        engine.refuse = {"a"}
        answer = await http.post("/v1/completions", json={"model": "a"})
        assert answer.status_code == 503
        assert "retry-after" not in answer.headers
        assert "the engine cannot load it" in answer.json()["error"]["message"]


@in_a_loop
async def test_an_unknown_model_gets_openais_error_with_the_nearest_name(front) -> None:
    async def handler(*_: Any) -> None:
        raise AssertionError("it must not get this far")

    async with front(handler) as (http, m, _, ended):
        answer = await http.post("/v1/completions", json={"model": "ab"})
        message = "the model 'ab' does not exist: did you mean 'a'?"
        expected = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
        assert (answer.status_code, answer.json()) == (404, {"error": expected})
        assert (ended[-1].status, ended[-1].adapter) == (404, None)
        m.fleet.complete = False
        answer = await http.post("/v1/completions", json={"model": "aa"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


@in_a_loop
async def test_a_request_cannot_set_its_priority(front) -> None:
    async with front(echo) as (http, _, _, _):
        assert (await http.post("/v1/completions", json={"model": "a", "priority": 0})).status_code == 200
        answer = await http.post("/v1/completions", json={"model": "a", "priority": -9})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "priority"


@in_a_loop
async def test_every_request_ends_with_its_id_its_version_and_its_outcome(front, base) -> None:
    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        if scope["path"] == "/half":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] in ("/breaks", "/half"):
            raise RuntimeError("broken")
        await say(send, {}, status=int(scope["path"][1:]))

    async with front(handler) as (http, _, _, ended):
        for path, model, outcome in (
            ("/200", "a", "ok"),
            ("/200", base.name, "ok"),
            ("/404", base.name, "client_error"),
            ("/200", "none", "client_error"),
            ("/500", "a", "server_error"),
            ("/breaks", "a", "server_error"),
            ("/half", "a", "server_error"),
        ):
            await http.post(path, json={"model": model})
            assert ended[-1].status is not None
            assert (ended[-1].outcome, ended[-1].model) == (outcome, model)
            assert (ended[-1].version is not None) == (model == "a")
            assert ended[-1].adapter == ("a" if model == "a" else None)
        assert len({request.id for request in ended}) == len(ended)


@in_a_loop
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_handler_that_raises_gives_openais_500_with_the_id_that_the_log_has(front, method: str, caplog) -> None:
    async def handler(*_: Any) -> None:
        raise KeyError("/secret/path")

    async with front(handler) as (http, _, _, _):
        headers = {"X-Request-Id": "mine-1"}
        answer = await http.request(method, "/v1/x", json={"model": "a"}, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-1")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("InternalServerError", 500)
    assert "mine-1" in error["message"]
    assert "secret" not in answer.text
    (record,) = caplog.records
    assert (record.getMessage(), record.status) == ("/v1/x 500, request mine-1", 500)
    assert record.exc_info[0] is KeyError


@in_a_loop
async def test_a_path_that_the_router_does_not_know_is_no_failure_of_the_server(front) -> None:
    app = FastAPI()
    async with front(app.router.middleware_stack, serves=lambda _: False) as (_, _, gateway, _):
        app.router.middleware_stack = gateway
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            for method, path, status in (("GET", "/nonsense", 404), ("POST", "/openapi.json", 405)):
                assert (await http.request(method, path)).status_code == status


@in_a_loop
async def test_a_request_keeps_the_id_of_its_client_and_handlers_know_it(front) -> None:
    seen = []

    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        seen.append(dict(scope["headers"])[b"x-request-id"].decode())
        await say(send, {})

    async with front(handler) as (http, _, _, ended):
        for given, kept in (("mine-1", True), ("with space", False), ("x" * 200, False), (None, False)):
            headers = {} if given is None else {"X-Request-Id": given}
            answer = await http.post("/v1", json={"model": "a"}, headers=headers)
            assert answer.headers["x-request-id"] == seen[-1] == ended[-1].id
            assert (ended[-1].id == given) is kept


async def ask_and_disconnect(gateway: Any) -> None:
    """Send a request for the model `a` whose client disconnects at once."""
    messages = iter([{"type": "http.request", "body": b'{"model": "a"}'}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(_: Any) -> None: ...

    await gateway(dict(SCOPE), receive, send)


@in_a_loop
async def test_a_request_whose_client_disconnects_counts_as_cancelled(front) -> None:
    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        assert (await receive())["type"] == "http.disconnect"
        await say(send, None)  # as vLLM's handlers do, to a closed connection

    async with front(handler) as (_, _, gateway, ended):
        await ask_and_disconnect(gateway)
        assert ended[0].outcome == "cancelled"


@in_a_loop
async def test_a_closed_gateway_admits_no_request_and_waits_for_those_that_run(front) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        started.set()
        await go_on.wait()
        await say(send, "complete")

    async with front(handler) as (http, _, gateway, _):
        running = asyncio.create_task(http.post("/v1", json={"model": "a"}))
        await started.wait()
        closing = asyncio.create_task(gateway.close("the server is shutting down", finish_s=60))
        while not gateway.closed:
            await asyncio.sleep(0)
        refused = await http.post("/v1", json={"model": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["message"].startswith("the server is shutting down")
        assert gateway.not_ready() == ["the server is shutting down"]
        assert not closing.done()
        go_on.set()
        assert (await running).json() == "complete"
        await closing


@in_a_loop
async def test_a_request_past_the_deadline_gets_an_error_that_clients_understand(front) -> None:
    started = []

    async def handler(scope, receive, send) -> None:
        await body_of(receive)
        if scope["path"] == "/stream":
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-other", b"1")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        started.append(scope["path"])
        await asyncio.Event().wait()

    async with front(handler) as (http, _, gateway, ended):
        running = [asyncio.create_task(http.post(path, json={"model": "a"})) for path in ("/whole", "/stream")]
        while len(started) < len(running):
            await asyncio.sleep(0)
        await gateway.close("the server is shutting down", finish_s=0)
        whole, stream = await asyncio.gather(*running)
        assert whole.status_code == 503
        assert "was not finished before the deadline" in whole.json()["error"]["message"]
        *_, last = stream.text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
        assert not gateway.running
        assert [(request.outcome, request.complete) for request in ended] == [("server_error", True)] * 2
        await gateway.close("again", finish_s=0)


@in_a_loop
async def test_the_engines_work_for_a_request_ends_before_its_lease(front) -> None:
    """A cancelled handler of vLLM's leaves a task behind that goes on computing."""
    aborted, left_behind, stop = [], [], asyncio.Event()

    async def compute(request: Request) -> None:
        with request.computes("engine-1"):
            await stop.wait()

    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        left_behind.append(asyncio.create_task(compute(requests.current.get())))
        await asyncio.sleep(0)
        await say(send, "x")

    async def abort(ids: set[str]) -> None:
        (request,) = gateway.running
        aborted.append((ids, len(residence.leases), request.over))
        stop.set()

    async with front(handler, abort) as (http, m, gateway, _):
        residence = m.residence(m.fleet.aliases["a"].current)
        await http.post("/v1", json={"model": "a"})
        assert aborted == [({"engine-1"}, 1, True)]
        assert left_behind[0].done()
        assert not residence.leases


async def answer_before(work: Any, send: Any) -> None:
    """Answer as a handler does that leaves its work to the background."""
    request = requests.current.get()
    assert request is not None
    request.background.add(asyncio.create_task(work))
    await say(send, "queued")


@in_a_loop
async def test_work_in_the_background_keeps_its_lease_and_a_server_that_ends_waits_for_it(front) -> None:
    go_on, over = asyncio.Event(), []

    async def work() -> None:
        await go_on.wait()
        over.append(requests.current.get().over)

    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        await answer_before(work(), send)

    async with front(handler) as (_, m, gateway, ended):
        answered = asyncio.Event()
        messages = iter([{"type": "http.request", "body": b'{"model": "a"}'}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                answered.set()

        residence = m.residence(m.fleet.aliases["a"].current)
        request = asyncio.create_task(gateway(dict(SCOPE), receive, send))
        await answered.wait()
        closing = asyncio.create_task(gateway.close("the server is shutting down", finish_s=60))
        await quiet()
        assert (len(residence.leases), ended, closing.done()) == (1, [], False)
        go_on.set()
        await asyncio.gather(request, closing)
        assert (residence.leases, over) == (set(), [False])
        assert [(one.outcome, one.status) for one in ended] == [("ok", 200)]


@in_a_loop
async def test_work_in_the_background_is_not_cancelled_by_a_client_that_disconnects(front) -> None:
    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        requests.current.get().background.add(asyncio.create_task(asyncio.sleep(0)))
        assert (await receive())["type"] == "http.disconnect"
        await say(send, "queued")

    async with front(handler) as (_, _, gateway, ended):
        await ask_and_disconnect(gateway)
        assert ended[0].outcome == "ok"


@in_a_loop
async def test_work_in_the_background_that_outlives_the_deadline_is_cancelled(front) -> None:
    tasks = []

    async def handler(_scope, receive, send) -> None:
        await body_of(receive)
        await answer_before(asyncio.Event().wait(), send)
        tasks.extend(requests.current.get().background)

    async with front(handler) as (http, m, gateway, ended):
        running = asyncio.create_task(http.post("/v1", json={"model": "a"}))
        while not tasks:
            await asyncio.sleep(0)
        await gateway.close("the server is shutting down", finish_s=0)
        assert (await running).json() == "queued"
        assert tasks[0].cancelled()
        assert not m.residence(m.fleet.aliases["a"].current).leases
        assert [one.outcome for one in ended] == ["server_error"]


@in_a_loop
async def test_work_in_the_background_of_a_handler_that_fails_is_cancelled(front) -> None:
    tasks = []

    async def handler(_scope, receive, _send) -> None:
        await body_of(receive)
        tasks.append(asyncio.create_task(asyncio.Event().wait()))
        requests.current.get().background.update(tasks)
        raise RuntimeError("broken")

    async with front(handler) as (http, _, _, _):
        assert (await http.post("/v1", json={"model": "a"})).status_code == 500
        assert tasks[0].cancelled()


@in_a_loop
async def test_prompt_logprobs_are_refused_where_the_engine_would_give_wrong_ones(front) -> None:
    async with front(echo) as (http, m, _, _):
        bodies = [{"model": "a", "prompt_logprobs": 1}, {"model": "a", "echo": True, "logprobs": 0}]
        for body in bodies:
            assert (await http.post("/v1", json=body)).status_code == 200
        m.residence(m.fleet.aliases["a"].current).adapts_head = True
        for body in bodies:
            assert (await http.post("/v1", json=body)).status_code == 400
        for body in ({"model": "a"}, {"model": "a", "echo": True}, {"model": "a", "logprobs": 1}):
            assert (await http.post("/v1", json=body)).status_code == 200


@in_a_loop
async def test_a_canary_gets_its_share_of_one_key_and_a_user_stays_with_one_version(front, store, write_lora) -> None:
    async with front(echo) as (http, m, _, ended):
        current, canary = m.fleet.aliases["a"].current, Version("a", store.add(write_lora("two", 2.0)))
        m.fleet.point("a", Alias(current, canary=canary, weight=0.5), 1)
        http.headers["Authorization"] = "Bearer one-key"

        async def versions(bodies: Iterable[dict[str, Any]]) -> Counter[Version]:
            ended.clear()
            for body in bodies:
                await http.post("/v1", json={"model": "a", **body})
            return Counter(one.version for one in ended)

        for without_user in ({}, {"user": ""}, {"user": 3}):
            assert 20 < (await versions([without_user] * 100))[canary] < 80
        assert 20 < (await versions({"user": str(number)} for number in range(100)))[canary] < 80
        for user in ("x", "y", "z"):
            assert len(await versions([{"user": user}] * 10)) == 1


@in_a_loop
async def test_a_request_that_is_none_to_a_model_loads_nothing(front, engine) -> None:
    """vLLM guards certain paths with its API keys: on others a client has shown none."""
    async with front(echo, serves=lambda scope: scope["path"].startswith("/v1")) as (http, _, _, ended):
        assert (await http.post("/nonsense", json={"model": "a"})).json() == []
        assert not engine.loaded
        assert not ended
        assert (await http.post("/v1/completions", json={"model": "a"})).json() == ["a"]


@in_a_loop
async def test_a_request_without_a_model_is_the_bases(front, base) -> None:
    async with front(echo) as (http, _, _, ended):
        await http.post("/v1/completions", json={"prompt": "x"})
        assert (ended[-1].model, ended[-1].adapter, ended[-1].outcome) == (base.name, None, "ok")
        assert (await http.post("/v1/completions", json={"prompt": "x", "priority": -1})).status_code == 400


@in_a_loop
async def test_a_request_that_waits_for_a_place_ends_with_its_client_or_at_the_drain_deadline(front) -> None:
    async def handler(_scope, receive, _send) -> None:
        await body_of(receive)
        await asyncio.Event().wait()

    async with front(handler, stations=Stations(place=Places(1).place)) as (http, m, gateway, ended):
        running = asyncio.create_task(http.post("/v1", json={"model": "a"}))
        await quiet()
        waiting = asyncio.create_task(http.post("/v1", json={"model": "a"}))
        await quiet()
        await ask_and_disconnect(gateway)
        assert [(request.outcome, request.disconnected) for request in ended] == [("cancelled", True)]
        assert len(m.residence(m.fleet.aliases["a"].current).leases) == 2
        await gateway.close("the server is shutting down", finish_s=0)
        assert [answer.status_code for answer in await asyncio.gather(running, waiting)] == [503, 503]
