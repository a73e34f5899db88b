"""A stand-in for the engine that fails where an engine would: loaded twice, asked for too many adapters."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from astra_serve.adapters.schedule import HEADROOM
from astra_serve.errors import ServeError
from converter import adapter_dir

MODULE = "model.layers.0.self_attn.q_proj"  # 32 x 32 in the tiny base


class StandInEngine:
    """Keeps adapters by name; the first number of an adapter shifts every answer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.loaded: dict[str, float] = {}
        self.loads: list[str] = []
        self.refuse: set[str] = set()
        self.silent: set[str] = set()  # adapters that change nothing
        self.partly: set[str] = set()  # adapters of which a module is left out
        self.stuck: set[str] = set()  # adapters that cannot be unloaded
        self.asked: list[tuple[str | None, int, bool]] = []
        self.died = asyncio.Event()
        self.gate = asyncio.Event()  # loads and unloads wait while it is not set
        self.gate.set()
        self.pause: Callable[[], Awaitable[None]] = self.gate.wait

    async def load(self, name: str, folder: Path) -> str:
        await self.pause()
        if any(name.startswith(refused) for refused in self.refuse):
            raise ServeError("the engine cannot load it: it said no")
        assert name not in self.loaded, f"{name} is loaded twice"
        assert len(self.loaded) < self.capacity + HEADROOM, "the engine would have evicted an adapter by itself"
        factors = adapter_dir.load_lora(folder).layers[MODULE]
        self.loaded[name] = 0.0 if any(name.startswith(s) for s in self.silent) else float(factors[0][0, 0])
        self.loads.append(name)
        return name

    async def left_out(self, handle: str) -> list[str]:
        return [MODULE] if any(handle.startswith(name) for name in self.partly) else []

    async def unload(self, handle: str) -> None:
        await self.gate.wait()
        if any(handle.startswith(name) for name in self.stuck):
            raise ServeError(f"the engine still holds {handle}")
        del self.loaded[handle]

    async def in_slots(self) -> set[str]:
        return set(self.loaded)

    async def next_tokens(
        self, prompts: list[list[int]], handle: str | None, *, urgent: bool = False
    ) -> list[dict[int, float]]:
        self.asked.append((handle, len(prompts), urgent))
        await asyncio.sleep(0)
        shift = 0.0 if handle is None else self.loaded[handle]
        return [{token: -1.0 - token / 10 - shift for token in range(20)} for _ in prompts]
