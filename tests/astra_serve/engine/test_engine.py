"""When an engine is lost, and what is asked of it, with a stand-in for its client; tests/e2e loses a real one."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astra_serve.engine import vllm
from astra_serve.engine.vllm import VllmEngine
from astra_serve.errors import EngineLost, ServeError
from astra_serve.gateway.tenancy.places import SURPLUS
from tests.astra_serve.world import ManualClock, in_a_loop


class Client:
    """Answers when a test lets it."""

    errored = False

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked = 0
        self.calls: list[tuple[str, int]] = []

    async def collective_rpc(self, _method: str) -> Any:
        self.asked += 1
        return await self.answer

    async def add_lora(self, request: Any) -> None:
        self.calls.append(("add", request.lora_int_id))
        raise RuntimeError("size mismatch\nand a traceback")

    async def remove_lora(self, number: int) -> None:
        self.calls.append(("remove", number))


@in_a_loop
async def test_an_engine_is_lost_while_a_question_waits_too_long_and_found_again_by_its_answer(monkeypatch) -> None:
    monkeypatch.setattr(vllm, "ANSWER_S", 0.01)
    client, clock = Client(), ManualClock()
    engine = VllmEngine(client, "base", 300.0, clock)
    await clock.advance(301)
    assert engine.lost() is None  # it was not asked
    for _ in range(3):
        with pytest.raises(ServeError, match="has not answered"):
            await engine.in_slots()
    assert client.asked == 1
    await clock.advance(60)
    assert engine.not_ready() == []
    await clock.advance(1)
    assert engine.not_ready() == ["the engine has not answered for 61 s"]
    assert engine.lost() is None
    await clock.advance(240)
    assert "(--engine-timeout)" in engine.lost()
    client.answer.set_result([[]])  # late, and no caller waits for it
    await clock.advance(0)
    assert engine.lost() is None
    assert engine.not_ready() == []


@in_a_loop
async def test_the_watch_ends_with_the_reason_when_the_engine_is_lost_at_two_looks() -> None:
    client, clock = Client(), ManualClock()
    engine = VllmEngine(client, "base", 300.0, clock)
    watching = asyncio.create_task(engine.watch())
    await clock.advance(1)
    client.errored = True
    await clock.advance(0.5)
    client.errored = False  # it was this process that was frozen
    await clock.advance(0.5)
    assert not watching.done()
    client.errored = True
    await clock.advance(0.5)
    await clock.advance(0.5)
    with pytest.raises(EngineLost, match="has died"):
        await watching


@in_a_loop
async def test_an_engine_that_answers_with_an_error_is_not_lost() -> None:
    client, clock = Client(), ManualClock()
    client.answer.set_exception(AttributeError("lora_index_to_id"))
    engine = VllmEngine(client, "base", 0.1, clock)
    with pytest.raises(ServeError, match="lora_index_to_id"):
        await engine.in_slots()
    await clock.advance(1)
    assert engine.lost() is None


@in_a_loop
async def test_a_load_that_failed_is_removed_from_the_engines_books(tmp_path: Path) -> None:
    client = Client()
    engine = VllmEngine(client, "base", 300.0, ManualClock())
    with pytest.raises(ServeError, match=r"^the engine cannot load it: size mismatch$"):
        await engine.load("a@1", tmp_path)
    (_, added), (_, removed) = client.calls
    assert added == removed


@in_a_loop
async def test_a_sequence_of_a_probe_lasts_one_step_behind_all_requests_unless_a_request_waits_for_it() -> None:
    class Computing:
        errored = False

        async def generate(self, _prompt: Any, params: Any, _id: str, *, priority: int, **_: Any) -> Any:
            asked.append((params.max_tokens, priority))
            yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[{5: SimpleNamespace(logprob=-1.0)}])])

    asked: list[tuple[int, int]] = []
    engine = VllmEngine(Computing(), "base", 300.0, ManualClock())  # type: ignore[arg-type]
    assert await engine.next_tokens([[1], [2]], None) == [{5: -1.0}] * 2
    await engine.next_tokens([[1]], None, urgent=True)
    assert asked == [(1, vllm.PROBE_PRIORITY)] * 2 + [(1, 0)]
    assert vllm.PROBE_PRIORITY > SURPLUS
