"""Publishes an adapter and kills its own process at a state of its way: `python -m ... ROOT BASE SOURCE STATE`."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from astra_serve.adapters.admission import open_base
from astra_serve.adapters.events import Event
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.store import Store
from astra_serve.control.control import Control
from astra_serve.control.reconcile import Reconciler
from tests.astra_serve.conftest import StandInEngine


async def main(root: Path, base: str, source: str, state: str) -> None:
    engine, store = StandInEngine(2), Store(root / "store")
    fleet = Fleet(engine, store, open_base(base), 2)
    reconciler = Reconciler(fleet, store)
    control = Control(str(root / "adapters.yaml"), fleet, reconciler)
    await control.refresh()
    if "a" in reconciler.status:
        await reconciler.settled("a")

    def kill(event: Event) -> None:
        if event.event == state:
            os.kill(os.getpid(), signal.SIGKILL)

    fleet.journal.readers.append(kill)
    print((await control.publish("a", source)).state)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
