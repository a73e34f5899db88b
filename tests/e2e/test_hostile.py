"""Adapters made to harm, published to the real server under load."""

import asyncio
import itertools
import shutil
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Admin
from tests.support import load, swap
from tests.support.hostile import OVERFLOWING, hostile
from tests.support.server import Server

pytestmark = pytest.mark.timeout(400)


def test_a_hundred_hostile_adapters_are_refused_and_traffic_is_undisturbed(server, admin, api, loras, tmp_path) -> None:
    """Each rule's own, over and over. Meanwhile every answer is the one that its adapter gave before."""
    attempts = list(itertools.islice(itertools.cycle(hostile(loras["sql"], tmp_path)), 100))
    assert len({name for name, _ in attempts}) > 40
    wrong = asyncio.run(refused(server, admin, attempts))
    assert wrong == []
    found = {adapter["name"]: adapter["state"] for adapter in api.get("/adapters").json()["adapters"]}
    assert found == dict.fromkeys(loras, "serving")
    assert server.process.poll() is None


def test_all_answers_are_the_same_after_ten_adapters_that_overflow(server, api, loras, tmp_path) -> None:
    def ask(http: httpx.Client, model: str, prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0}
        return http.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]

    prompts = [f"{prompt} {number}" for number in range(4) for prompt in swap.PROMPTS[:5]]
    with httpx.Client(timeout=60) as http:

        def answers() -> list[str]:
            return [ask(http, model, prompt) for model in ("base", *loras) for prompt in prompts]

        before = answers()
        for number, (name, damage) in enumerate(OVERFLOWING.items()):
            copy = tmp_path / str(number)
            shutil.copytree(loras["sql"], copy)
            damage(copy)
            answer = api.put("/adapters/overflow", json={"source": str(copy), "allow_no_effect": True})
            assert answer.status_code == 422, name
            assert answers() == before, name


async def refused(server: Server, admin: Admin, attempts: list[tuple[str, Path]]) -> list[str]:
    """Publish each under load; return what went wrong."""
    headers = {"Authorization": f"Bearer {admin.token}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin.port}", headers=headers, timeout=60) as http:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as asking:
            known = {p: (await load.ask(asking, "sql", p, 16, stream=False)).text for p in swap.PROMPTS}

        def judge(_: str, prompt: str, answer: load.Answer) -> str | None:
            return None if answer.text == known[prompt] else "mixed"

        def pick(number: int, turn: int) -> tuple[str, str]:
            return "sql", swap.PROMPTS[(number + turn) % len(swap.PROMPTS)]

        traffic, stop = load.Load(server.url, 4, pick, judge, 16), asyncio.Event()
        running = asyncio.create_task(traffic.run(stop))
        wrong = []
        for name, folder in attempts:
            answer = await http.put("/adapters/hostile", json={"source": str(folder)})
            if answer.status_code != 422 or "was not published" not in answer.json()["error"]["message"]:
                wrong.append(f"{name}: {answer.status_code} {answer.text}")
        stop.set()
        await running
    if traffic.requests < 20 or any(traffic.faults.values()):
        wrong.append(f"traffic: {traffic.requests} requests, {traffic.faults} {traffic.examples}")
    return wrong
