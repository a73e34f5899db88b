"""The answers of an admin port as text for people."""

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def event(console: Console, found: dict[str, Any]) -> None:
    """Print an event."""
    when = time.strftime("%H:%M:%S", time.localtime(found["time"]))
    reason = f": {found['reason']}" if found["reason"] else ""
    took = f" ({sum(found['seconds'].values()):.2f} s)" if found["seconds"] else ""
    console.print(
        Text(f"{when}  {found['version'] or found['adapter']}  {found['event']}{took}{reason}"), soft_wrap=True
    )


def show(content: dict[str, Any]) -> None:
    """Print the answer of an admin port: events, the state of the server, or adapters."""
    console = Console()
    if "events" in content:
        for one in content["events"]:
            event(console, one)
        return
    if "running" in content:
        state = "drained: not ready" if content["drained"] else "in rotation"
        console.print(f"{state}; {content['running']} requests run")
        return
    adapters = content.get("adapters", [content])
    if fault := content.get("document", {}).get("fault"):
        console.print(Text(f"the document is not followed as it is now: {fault}"), soft_wrap=True)
    table = Table("adapter", "state", "version", "where", "requests", "effect", "previous")
    for adapter in adapters:
        previous, canary = str(len(adapter.get("previous", []))), adapter.get("canary")
        table.add_row(Text(adapter["name"]), Text(_state(adapter)), *_version(adapter.get("version")), previous)
        if canary:
            share = "no request yet" if canary["share"] is None else f"so far {canary['share']:.0%}"
            table.add_row(f"  canary {canary['weight']:.0%}", share, *_version(canary), "")
    console.print(table)
    for adapter in adapters:
        if adapter.get("reason"):
            console.print(Text(f"{adapter['name']}: {adapter['reason']}"), soft_wrap=True)


def _state(adapter: dict[str, Any]) -> str:
    publishing = adapter.get("publishing")
    state = str(adapter["state"])
    return f"{state}, publishing ({publishing['state']})" if publishing and adapter["version"] else state


def _version(version: dict[str, Any] | None) -> list[str]:
    """Return the cells of a version: digest, residency, running requests, effect."""
    if version is None:
        return [""] * 4
    probe = version["probe"]
    effect = f"{probe['effect']:.2f} nats" if probe else ""
    return [version["name"].partition("@")[2], version["residency"], str(version["requests"]), effect]
