"""When an engine is lost, with a stand-in for its client; tests/helm/test_nodes.py loses a real one."""

import asyncio
from typing import Any

import pytest

from astra_serve.engine import vllm as engine
from astra_serve.engine.vllm import VllmEngine
from astra_serve.errors import ServeError
from tests.astra_serve.adapters.test_fleet import in_a_loop


class Client:
    """Answers when it is let."""

    errored = False

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked = 0

    async def collective_rpc(self, _method: str) -> Any:
        self.asked += 1
        return await self.answer


@in_a_loop
async def test_an_engine_is_lost_while_a_question_waits_too_long_and_found_again_by_its_answer(monkeypatch) -> None:
    monkeypatch.setattr(engine, "ANSWER_S", 0.05)
    client = Client()
    found = VllmEngine(client, "base", 0.5)
    await asyncio.sleep(0.6)
    assert found.lost() is None  # it was not asked
    for _ in range(3):
        with pytest.raises(ServeError, match="has not answered"):
            await found.in_slots()
    assert client.asked == 1
    assert found.not_ready()
    assert found.lost() is None
    await asyncio.sleep(0.5)
    assert "(--engine-timeout)" in found.lost()
    client.answer.set_result([[]])  # late, and nobody waits for it
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert found.lost() is None
    assert found.not_ready() == []


@in_a_loop
async def test_an_engine_that_answers_with_an_error_is_there() -> None:
    client = Client()
    client.answer.set_exception(AttributeError("lora_index_to_id"))
    found = VllmEngine(client, "base", 0.1)
    with pytest.raises(ServeError, match="lora_index_to_id"):
        await found.in_slots()
    await asyncio.sleep(0.2)
    assert found.lost() is None


@in_a_loop
async def test_an_engine_that_died_is_lost_at_once() -> None:
    client = Client()
    client.errored = True
    assert "has died" in VllmEngine(client, "base", 300.0).lost()
