r"""The changes of each adapter, one after the other: which one runs, which ones wait, and which one is superseded.

    newer \ older           publish, rollback, canary    remove, pin, unpin
    publish, rollback,      superseded                   waited for
    remove
    canary, pin, unpin      waited for                   waited for

A change is superseded only as long as it has not begun to write the document: its caller gets an error that names the
newer change, and its download ends. From then on newer changes wait until it ends: a `remove` ends when the document
has been written, every other change when the reconciler has its outcome.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from astra_serve.control.status import Status
from astra_serve.errors import Superseded

SUPERSEDE = ("publish", "rollback", "remove")
SUPERSEDED = ("publish", "rollback", "canary")


@dataclass(eq=False)
class Change:
    """One change of an adapter."""

    kind: str  # the name of the operation
    task: "asyncio.Task[Any]"
    status: Status | None = None  # of the version that it prepares
    writing: bool = False  # nothing supersedes it any more
    superseded_by: str | None = None


class Changes:
    """All changes that run or wait, by the adapter's name."""

    def __init__(self) -> None:
        self._changes: defaultdict[str, list[Change]] = defaultdict(list)
        self._turn: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def preparing(self) -> dict[str, Status]:
        """Return the status of each version that is prepared for a change now, by the adapter's name."""
        return {name: one.status for name, all_ in self._changes.items() for one in all_ if one.status}

    @asynccontextmanager
    async def turn(self, name: str, kind: str) -> AsyncIterator[Change]:
        """Wait for the turn of a change, and let the next one wait until the block ends. Raises Superseded."""
        task = asyncio.current_task()
        assert task is not None
        if kind in SUPERSEDE:
            for earlier in self._changes[name]:
                if earlier.kind in SUPERSEDED and not (earlier.writing or earlier.superseded_by):
                    earlier.superseded_by = kind
                    earlier.task.cancel()
        change = Change(kind, task)
        self._changes[name].append(change)
        try:
            async with self._turn[name]:
                yield change
        except asyncio.CancelledError:
            if change.superseded_by is None or task.uncancel():
                raise
            raise Superseded(f"this {kind} of {name!r} was superseded by a newer {change.superseded_by}") from None
        finally:
            self._changes[name].remove(change)
            if not self._changes[name]:
                del self._changes[name], self._turn[name]
