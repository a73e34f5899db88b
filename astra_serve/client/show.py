"""The answers of an admin port as text for people."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from astra_serve.client.state import (
    AdapterList,
    AdapterState,
    CanaryState,
    Event,
    EventList,
    Removed,
    Rotation,
    VersionState,
)


def event(console: Console, found: Event) -> None:
    """Print an event."""
    when = time.strftime("%H:%M:%S", time.localtime(found.time))
    reason = f": {found.reason}" if found.reason else ""
    took = f" ({sum(found.seconds.values()):.2f} s)" if found.seconds else ""
    console.print(Text(f"{when}  {found.version or found.adapter}  {found.event}{took}{reason}"), soft_wrap=True)


def show(answer: object) -> None:
    """Print the answer of an admin port."""
    console = Console()
    match answer:
        case EventList():
            for one in answer:
                event(console, one)
        case Rotation():
            state = "drained: not ready" if answer.drained else "in rotation"
            console.print(f"{state}; {answer.running} requests run")
        case Removed():
            console.print(f"{answer.name} is {answer.state}")
        case AdapterList():
            if fault := answer.document.fault:
                console.print(Text(f"the document is not followed as it is now: {fault}"), soft_wrap=True)
            _adapters(console, answer.adapters)
        case AdapterState():
            _adapters(console, [answer])


def _adapters(console: Console, adapters: Sequence[AdapterState]) -> None:
    table = Table("adapter", "state", "version", "where", "requests", "effect", "previous")
    for adapter in adapters:
        previous, canary = str(len(adapter.previous)), adapter.canary
        table.add_row(Text(adapter.name), Text(_state(adapter)), *_version(adapter.version), previous)
        if canary:
            table.add_row(f"  canary {canary.weight:.0%}", _share(canary), *_version(canary), "")
    console.print(table)
    for adapter in adapters:
        if adapter.reason:
            console.print(Text(f"{adapter.name}: {adapter.reason}"), soft_wrap=True)


def _state(adapter: AdapterState) -> str:
    if adapter.publishing and adapter.version:
        return f"{adapter.state}, publishing ({adapter.publishing.state})"
    return adapter.state


def _share(canary: CanaryState) -> str:
    return "no request yet" if canary.share is None else f"so far {canary.share:.0%}"


def _version(version: VersionState | None) -> list[str]:
    """Return the cells of a version: digest, residency, running requests, effect."""
    if version is None:
        return [""] * 4
    effect = f"{version.probe.effect:.2f} nats" if version.probe else ""
    return [version.name.partition("@")[2], version.residency, str(version.requests), effect]
