"""Counts requests, and kills its own process: `python -m ... FOLDER`."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Events
from astra_serve.gateway.request import Request
from astra_serve.observe import ledger as ledgers
from astra_serve.observe.ledger import Ledger
from astra_serve.observe.ledger_file import LedgerFile


async def main(folder: Path) -> None:
    fleet = SimpleNamespace(base_name="base", expected=set(), events=Events())
    ledger = Ledger(LedgerFile(folder), fleet, Clock())  # type: ignore[arg-type]
    request = Request("1", "/v1/completions", "base", None, status=200, complete=True, output_tokens=3)  # type: ignore[arg-type]
    writing = asyncio.create_task(ledger.run())
    for _ in range(5):
        ledger.count(request)
    await asyncio.sleep(2 * ledgers.EVERY_S)
    assert not writing.done()
    ledger.count(request)  # in the last second
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
