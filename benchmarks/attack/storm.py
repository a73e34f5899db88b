"""A minute of swaps under load, with disconnects and hostile publications, while every answer is compared."""

import asyncio
import itertools
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.attack.target import Target
from tests.support.hostile import hostile
from tests.support.swap import Pace, swapped


def attack(target: Target, seconds: float) -> None:
    folders = [folder for _, folder in hostile(target.good[0], target.folder / "storm")]
    folders += (target.folder / "overflowing").glob("*")
    found = asyncio.run(storm(target, folders, Pace(int(seconds), 1.0, 2.0)))
    target.note("storm", f"{found['swaps']} swaps, {found['requests']} requests", fault(found))
    target.check_neighbours("storm")


def fault(found: dict[str, Any]) -> str | None:
    """Return what was wrong in a storm."""
    if found["broken"] or found["failed"] or found["mixed"] or found["stale"]:
        return f"{found['broken']}, {found['failed']} failed, {found['mixed']} mixed: {found['examples']}"
    return None if found["left_in_engine"] == 1 else f"{found['left_in_engine']} versions are left in the engine"


async def storm(target: Target, hostile_folders: list[Path], pace: Pace) -> dict[str, Any]:
    """Swap at a pace, while other clients leave and hostile adapters are published; return what `swapped` measures."""
    stop = asyncio.Event()
    beside = [
        asyncio.create_task(_leave(target, stop, seed)) for seed in range(3)
    ] + [asyncio.create_task(_publish(target, stop, hostile_folders))]  # fmt: skip
    try:
        return await swapped(target.server, target.admin_port, target.token, target.good, pace)
    finally:
        stop.set()
        await asyncio.gather(*beside)


async def _leave(target: Target, stop: asyncio.Event, seed: int) -> None:
    """Start streams and leave them, after a random time."""
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=target.server.url, timeout=30) as http:
        while not stop.is_set():
            body = {"model": chance.choice(target.NEIGHBOURS), "prompt": "x", "max_tokens": 200, "ignore_eos": True}
            with suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(chance.uniform(0.0, 0.5)):
                    await http.post("/v1/completions", json={**body, "stream": chance.random() < 0.5})
            await asyncio.sleep(chance.uniform(0.0, 0.3))


async def _publish(target: Target, stop: asyncio.Event, folders: list[Path]) -> None:
    headers = {"Authorization": f"Bearer {target.token}"}
    async with httpx.AsyncClient(base_url=target.admin_url, headers=headers, timeout=60) as http:
        for folder in itertools.cycle(folders):
            if stop.is_set():
                return
            answer = await http.put("/adapters/attacked", json={"source": str(folder)})
            if answer.status_code not in (409, 422):
                target.note("storm", f"hostile {folder}", f"{answer.status_code} {answer.text[:200]}")
            await asyncio.sleep(0.2)
