"""A running admin API with a stand-in for the engine, for clients that connect over real HTTP."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from astra_serve.adapters.upload_target import UploadTarget
from tests.astra_serve.stand_in import StandInEngine
from tests.astra_serve.world import TOKEN, World, server
from tests.support.server import free_port


@dataclass(frozen=True)
class Admin:
    """A server whose admin port is open; its loop runs in a thread of its own."""

    port: int
    world: World
    engine: StandInEngine
    loop: asyncio.AbstractEventLoop

    def release(self) -> None:
        """Let the engine load what waits at its gate."""
        self.loop.call_soon_threadsafe(self.engine.gate.set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def admin(engine, store, base, tmp_path: Path, monkeypatch) -> Iterator[Admin]:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", TOKEN)
    number, started = free_port(), threading.Event()
    servers: list[uvicorn.Server] = []
    worlds: list[World] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        target = UploadTarget(str(tmp_path / "shared"))
        async with server(engine, store, base, tmp_path / "adapters.yaml", upload_to=target) as w:
            servers.append(uvicorn.Server(uvicorn.Config(w.admin_app, port=number, log_level="warning")))
            worlds.append(w)
            loops.append(asyncio.get_running_loop())
            started.set()
            await servers[0].serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(10)
    while not servers[0].started:
        threading.Event().wait(0.01)
    yield Admin(number, worlds[0], engine, loops[0])
    servers[0].should_exit = True
    thread.join(10)


@pytest.fixture
def port(admin: Admin) -> int:
    return admin.port
