"""Slots in their order, no origin with more than its share, and threads that hold nothing up when they hang."""

import asyncio
import subprocess
import sys
import threading

import pytest

from astra_serve.adapters.pool import Slots, Threads
from tests.astra_serve.world import in_a_loop, quiet


@in_a_loop
async def test_no_origin_takes_more_than_its_share_and_all_are_served_in_their_order() -> None:
    slots, granted = Slots(most=3, share=2), list[str]()

    async def use(name: str) -> None:
        async with slots.of(name[0]):
            granted.append(name)
            await asyncio.Event().wait()

    tasks = {name: asyncio.create_task(use(name)) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    await quiet()
    assert granted == ["a1", "a2", "b1"]
    for ended, then in (("b1", ["b2"]), ("a1", ["a3"]), ("a2", ["c1"])):
        tasks[ended].cancel()
        await quiet()
        assert granted[-1:] == then
    assert len(granted) == 6
    for task in tasks.values():
        task.cancel()
    await quiet()
    async with asyncio.timeout(1), slots.of("d"), slots.of("d"), slots.of("e"):  # none is lost
        pass


@in_a_loop
async def test_a_slot_that_was_waited_for_in_vain_is_free() -> None:
    slots = Slots(most=1, share=1)
    async with slots.of("a"):
        waiting = asyncio.create_task(slots.acquire("b"))
        await quiet()
        waiting.cancel()
        await quiet()
    async with slots.of("a"):
        granted = asyncio.create_task(slots.acquire("c"))
        await quiet()
    granted.cancel()  # it has the slot, and has not run since
    await quiet()
    async with asyncio.timeout(1), slots.of("d"):
        pass


@in_a_loop
async def test_a_thread_that_hangs_keeps_its_slot_until_it_ends() -> None:
    threads, end = Threads(most=2, share=1), threading.Event()
    hung = asyncio.create_task(threads.run("nfs", end.wait))
    await quiet()
    hung.cancel()
    await quiet()
    next_ = asyncio.create_task(threads.run("nfs", lambda: 1))
    assert await threads.run("disk", lambda: 2) == 2
    assert not next_.done()
    end.set()
    assert await next_ == 1
    with pytest.raises(ZeroDivisionError):
        await threads.run("disk", lambda: 1 // 0)


def test_a_process_ends_while_a_thread_hangs() -> None:
    script = """
import asyncio, threading
from astra_serve.adapters.pool import Threads

async def main():
    hung = asyncio.create_task(Threads(1, 1).run("nfs", threading.Event().wait))
    await asyncio.sleep(0.1)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
