"""The tasks of background responses, with a stand-in for vLLM's handler; tests/e2e asks the real one."""

import asyncio
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse

from astra_serve.engine import background
from astra_serve.gateway import request as requests
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy import caller
from astra_serve.gateway.tenancy.caller import Caller
from tests.astra_serve.world import in_a_loop, quiet

Value = TypeVar("Value")


def stored(status: Any) -> ResponsesResponse:
    asked, params = ResponsesRequest(model="a", input="x"), SamplingParams(max_tokens=1)
    return ResponsesResponse.from_request(asked, params, "a", 0, [], status, None)


async def completes() -> None: ...


async def fails() -> None:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("work", "before", "after", "outcome"),
    [
        (completes, "completed", "completed", "ok"),
        (completes, "cancelled", "cancelled", "cancelled"),
        (completes, "failed", "failed", "server_error"),
        (completes, "queued", "failed", "server_error"),
        (fails, "queued", "failed", "server_error"),
    ],
)
@in_a_loop
async def test_a_response_whose_work_has_ended_has_a_final_status_and_its_stream_ends(
    work: Any, before: str, after: str, outcome: str
) -> None:
    events, more = deque[Any](), asyncio.Event()
    responses = SimpleNamespace(response_store={"1": stored(before)}, event_store={"1": (events, more)})
    task = asyncio.current_task()
    assert task is not None
    request = Request("1", "/v1/responses", "a", task, status=200, complete=True)
    token = requests.current.set(request)
    tasks = background.Tasks(responses)  # type: ignore[arg-type]
    tasks["1"] = asyncio.create_task(work())
    requests.current.reset(token)
    assert request.background == {tasks["1"]}
    await quiet()
    assert (responses.response_store["1"].status, request.outcome) == (after, outcome)
    assert [(event.type, event.response.status) for event in events] == [("response.completed", after)]
    assert more.is_set()


def as_tenant(name: str, function: Callable[..., Value], *args: Any) -> Value:
    token = caller.current.set(Caller(name))
    try:
        return function(*args)
    finally:
        caller.current.reset(token)


def test_the_newest_responses_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(background, "KEPT", 2)
    newest = background.Newest[int]()
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        newest[key] = value
    assert dict(newest) == {"a": 3, "c": 4}


@pytest.mark.parametrize("kind", [background.Newest, lambda: background.Tasks(None)])  # type: ignore[arg-type]
def test_a_tenant_finds_its_own_responses_alone(kind: Callable[[], Any]) -> None:
    values = kind()
    for name in ("one", "other"):
        as_tenant(name, values.__setitem__, "same id", name)
    assert (as_tenant("one", values.get, "same id"), as_tenant("other", values.get, "same id")) == ("one", "other")
    assert as_tenant("third", values.get, "same id") is None
    assert as_tenant("third", lambda: ("same id" in values, list(values), len(values))) == (False, [], 0)
    assert as_tenant("third", values.pop, "same id", None) is None
    assert as_tenant("one", values.pop, "same id") == "one"
    assert as_tenant("other", values.get, "same id") == "other"


def test_a_tenant_with_many_responses_loses_its_own_first(monkeypatch) -> None:
    monkeypatch.setattr(background, "KEPT_OF_ALL", 4)
    newest = background.Newest[int]()
    as_tenant("calm", newest.__setitem__, "a", 0)
    for number in range(9):
        as_tenant("busy", newest.__setitem__, str(number), number)
    assert as_tenant("calm", dict, newest) == {"a": 0}
    assert as_tenant("busy", dict, newest) == {"6": 6, "7": 7, "8": 8}
