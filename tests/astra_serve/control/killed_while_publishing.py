"""Publishes an adapter and kills its own process at an event: `python -m ... ROOT BASE SOURCE EVENT`."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from astra_serve.adapters.admission import open_base
from astra_serve.adapters.events import Event
from astra_serve.adapters.store import Store
from tests.astra_serve.stand_in import StandInEngine
from tests.astra_serve.world import server


async def main(root: Path, base: str, source: str, last: str) -> None:
    store = Store(root / "store")
    async with server(StandInEngine(2), store, open_base(base), root / "adapters.yaml") as w:
        await w.control.refresh()
        if "a" in w.reconciler.status:
            await w.settled("a")

        def kill(event: Event) -> None:
            if event.event == last:
                os.kill(os.getpid(), signal.SIGKILL)

        w.events.subscribers.append(kill)
        await w.control.publish("a", source)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
