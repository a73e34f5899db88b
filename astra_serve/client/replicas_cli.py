"""`astra-serve adapters status, prepare, rollout`: the commands for several servers over one document."""

import argparse
import asyncio
import json
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from astra_serve.client import replicas
from astra_serve.client.replicas import ReplicasState
from astra_serve.client.rollout import prepare, rollout
from astra_serve.client.state import AdapterState
from astra_serve.errors import ServeError

POLL_S = 1.0


def run(args: argparse.Namespace, wanted: dict[str, Any], token: str) -> int:
    """Run the command of `args`; `wanted` describes a new version, as in the admin API.

    Return 0, 1 when replicas differ, after Ctrl-C, SIGTERM or SIGHUP 130. Raises ServeError.
    """
    try:
        return asyncio.run(_run(args, wanted, token))
    except asyncio.CancelledError:
        return 130


async def _run(args: argparse.Namespace, wanted: dict[str, Any], token: str) -> int:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    if args.command == "status":
        return await _status(args, token)
    async with replicas.connect(args.url, token, args.timeout) as found:
        if args.command == "prepare":
            digest = (await prepare(args.name, wanted, found, _report, args.timeout)).digest
            print(json.dumps({"name": args.name, "digest": digest}) if args.json else digest)
            return 0
        entry = await rollout(args.name, wanted, found, _report, args.timeout, args.document)
        print(entry.model_dump_json() if args.json else f"{entry.name} is {entry.digest} at all {len(found)}")
        return 0


async def _status(args: argparse.Namespace, token: str) -> int:
    loop = asyncio.get_running_loop()
    end = loop.time() + (args.wait or 0)
    patience = min(args.timeout, max(args.wait, POLL_S)) if args.wait else args.timeout
    while True:
        try:
            async with replicas.connect(args.url, token, patience) as found:  # the addresses change with the pods
                state = await replicas.status(found, args.expected)
        except ServeError as error:
            state = ReplicasState((), (str(error),))
        if not state.drift or loop.time() >= end:
            break
        await asyncio.sleep(POLL_S)
    if args.json:
        print(json.dumps(asdict(state), indent=2))
    else:
        _show(state)
    return 1 if state.drift else 0


def _report(step: str, text: str) -> None:
    with suppress(OSError, ValueError):  # its reader is gone: the work goes on
        print(f"{step:8} {text}", file=sys.stderr, flush=True)


def _show(state: ReplicasState) -> None:
    console = Console()
    by_replica = {one.replica: {adapter.name: adapter for adapter in one.adapters} for one in state.replicas}
    table = Table("adapter", *(name.partition("://")[2] for name in by_replica))
    for name in dict.fromkeys(name for adapters in by_replica.values() for name in adapters):
        cells = [_cell(adapters.get(name)) for adapters in by_replica.values()]
        table.add_row(Text(name), *map(Text, cells))
    if by_replica:
        console.print(table)
    for line in state.drift:
        console.print(Text(line), soft_wrap=True)
    if not state.drift:
        console.print(f"{len(by_replica)} of {len(by_replica)} replicas serve what the document says")


def _cell(adapter: AdapterState | None) -> str:
    if adapter is None:
        return "-"
    version = adapter.version.name.partition("@")[2] if adapter.version else ""
    return version if adapter.state == "serving" else f"{version} {adapter.state}".strip()
