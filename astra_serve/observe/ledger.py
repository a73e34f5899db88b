"""The ledger of usage: how many requests and tokens, by day, tenant, adapter and version.

A request that has ended is added to sums in memory; a task writes them every `EVERY_S`, in a thread, as one
transaction. SIGKILL loses the requests that have ended since the last write: those of `EVERY_S`, and of the time that a
write takes. An orderly end writes everything. While the file cannot be written (the disk is full, or read-only),
requests go on: the sums stay in memory and are written later; the events `usage_failed` and `usage_written` say so.

Names that make rows exist: tenants of the keys document, adapters of the document and the base. Others are counted
under `_unknown`; policies of trainers, whose names are new at each step, under `_other`, and so are requests that end
after their adapter was removed.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from datetime import date

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.pool import Threads
from astra_serve.errors import Unavailable
from astra_serve.gateway.request import Request
from astra_serve.observe.ledger_file import Batch, LedgerFile, logger
from astra_serve.observe.metrics import OTHER, UNKNOWN
from astra_serve.observe.sums import Key, Numbers, Question, Sums, Table, add_to, day_of, numbers_of

EVERY_S = 1.0  # between two writes
CLOSE_S = 5.0  # for the last write, when the server ends
Failures = (sqlite3.Error, OSError)


class Ledger:
    """Counts requests, and answers questions about them."""

    def __init__(self, file: LedgerFile, fleet: Fleet, clock: Clock, now: Callable[[], float] = time.time) -> None:
        """`now` returns seconds since 1970."""
        self.fault: str | None = None  # why the sums are in memory alone
        self._file, self._fleet, self._clock, self._now = file, fleet, clock, now
        self._pending: Sums = {}  # the next batch, since the last write
        self._writing: Batch | None = None  # until it is known to be on the disk; it does not change
        self._newest = 0  # number of the last batch that was begun
        self._writer, self._readers = Threads(1, 1), Threads(4, 1)  # a disk that hangs holds no other thread

    def today(self) -> date:
        """Return the present day of UTC."""
        return date.fromisoformat(day_of(self._now()))

    def count(self, request: Request) -> None:
        """Count a request that has ended."""
        adapter, version = self._served(request)
        add_to(self._pending, Key(day_of(self._now()), request.caller.name, adapter, version), numbers_of(request))

    async def run(self) -> None:
        """Write the sums every second, until cancelled."""
        await self._try(self._file.open)
        while True:
            await self._clock.sleep(EVERY_S)
            await self.write()

    async def write(self) -> None:
        """Write the sums of the requests that have ended; where that fails they stay, and are written next time."""
        if self._writing is None:
            if not self._pending:
                return
            self._newest += 1
            self._writing, self._pending = Batch(self._newest, self._pending), {}
        if await self._try(self._file.add, self._writing):
            self._writing = None

    async def answer(self, question: Question, asked_by: str = "") -> Table:
        """Return the rows of an answer, with the requests that have ended up to now.

        One question of each `asked_by` is answered at a time. Raises BadQuery where there are too many rows, and
        Unavailable where the file cannot be read.
        """
        # Taken before the file is read: a batch that is written meanwhile is in the file, and is left out here.
        batches = self._unwritten()
        try:
            return await self._readers.run(f"usage of {asked_by}", self._read, question, batches)
        except Failures as error:
            logger.warning("the usage ledger cannot be read: %s", error)
            raise Unavailable("the usage cannot be read now: the server's log has the reason", 5) from error

    async def __aenter__(self) -> "Ledger":
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write everything, and close the file. What cannot be written within CLOSE_S is lost, with a line."""
        left = self._unwritten()
        try:
            await asyncio.wait_for(self._writer.run("usage", self._file.close, left), CLOSE_S)
        except Failures as error:
            lost = sum(numbers.requests for batch in left for numbers in batch.sums.values())
            reason = str(error) or "the disk does not answer"
            logger.warning("the usage of %d requests is lost, %s cannot be written: %s", lost, self._file.path, reason)

    def _unwritten(self) -> list[Batch]:
        """Return the batch that may not be on the disk yet, and the next one as it is now."""
        return [*([self._writing] if self._writing else []), Batch(self._newest + 1, dict(self._pending))]

    def _read(self, question: Question, unwritten: list[Batch]) -> Table:
        newest, found = self._file.read(question)
        for batch in unwritten:
            if batch.number > newest:
                for key, numbers in batch.sums.items():
                    if question.matches(key):
                        add_to(found, question.row_of(key), numbers)
        return dict(sorted(found.items()))

    async def _try(self, work: Callable[..., None], *given: object) -> bool:
        """Do some work on the file in a thread, and return whether it is done. The first failure is an event."""
        try:
            await self._writer.run("usage", work, *given)
        except Exception as error:  # whatever it is: the server goes on
            reason = f"the usage ledger {self._file.path} cannot be written: {error}; its sums stay in memory"
            if reason != self.fault:
                self._fleet.events.emit(Event("", "usage_failed", reason=reason))
            self.fault = reason
            return False
        if self.fault:
            self._fleet.events.emit(Event("", "usage_written", reason="the usage ledger is written again"))
        self.fault = None
        return True

    def _served(self, request: Request) -> tuple[str, str]:
        """Return the names of the adapter and of the version that a request counts for."""
        if request.adapter is None:
            is_base = request.model == self._fleet.base_name and request.caller.may_use_base
            return (request.model if is_base else UNKNOWN), ""
        if request.adapter not in self._fleet.expected:
            return OTHER, ""
        return request.adapter, request.version.name if request.version else ""


def total(table: Table) -> Numbers:
    """Return the sum of all rows."""
    found = Numbers()
    for numbers in table.values():
        found = found.plus(numbers)
    return found
