"""The ledger on disk: `usage.sqlite` in the store's folder, which one server alone writes.

One table has a row for each day, tenant, adapter and version. A batch of sums is added in one transaction, which is on
the disk when `add` returns: neither SIGKILL nor a loss of power takes it. A batch has a number; one that is added twice
counts once, so that a write that was cut off can be repeated. A damaged file is renamed, and a new one begun.

sqlite3 reads the file while the server runs (WAL mode).
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from astra_serve.errors import BadQuery
from astra_serve.observe.sums import Key, Numbers, Question, Sums, Table

NAME = "usage.sqlite"
FORMAT = 1  # of the tables; SQLite's user_version
MOST_ROWS = 100_000  # of an answer
READ_S = 10.0  # the longest that a question may take
BUSY_S = 5.0  # another process that reads the file may hold it so long
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_COLUMNS = (*Key._fields, *Numbers._fields)
_TABLES = f"""
CREATE TABLE IF NOT EXISTS usage (
    {", ".join(f"{name} TEXT NOT NULL" for name in Key._fields)},
    {", ".join(f"{name} INTEGER NOT NULL" for name in Numbers._fields)},
    PRIMARY KEY ({", ".join(Key._fields)})
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_tenant ON usage (tenant, day);
CREATE TABLE IF NOT EXISTS newest_batch (process TEXT NOT NULL, number INTEGER NOT NULL);
PRAGMA user_version = {FORMAT};
"""
_ADD = f"""
INSERT INTO usage ({", ".join(_COLUMNS)}) VALUES ({", ".join("?" * len(_COLUMNS))})
ON CONFLICT DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in Numbers._fields)}
"""  # noqa: S608 (names of our own)

logger = logging.getLogger("vllm.astra_serve")


@dataclass(frozen=True)
class Batch:
    """Sums that are written together; `number` is larger than that of the batch before."""

    number: int
    sums: Sums


class LedgerFile:
    """The ledger of one server; its methods block, and are for threads that are not those of requests."""

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the store; nothing is opened yet."""
        self.path = folder / NAME
        self._process = uuid4().hex  # batches are numbered by each process anew
        self._connection: sqlite3.Connection | None = None
        self._turn = threading.Lock()

    def open(self) -> None:
        """Open the file, or begin a new one. Raises sqlite3.Error, and OSError."""
        with self._turn, self._without_damage():
            self._opened()

    def add(self, batch: Batch) -> None:
        """Add a batch, unless it was added before. Raises sqlite3.Error and OSError; then nothing of it is added."""
        with self._turn:
            self._add(batch)

    def read(self, question: Question) -> tuple[int, Table]:
        """Return the number of the newest batch of this process, and the rows of the answer.

        Raises sqlite3.Error and OSError, and BadQuery where there are too many rows.
        """
        if not self.path.exists():
            return 0, {}
        try:
            number, found = self._read(question)
        except sqlite3.DatabaseError as error:
            if _is_damage(error):
                with self._turn:
                    self._set_aside(error)
            raise
        if len(found) > MOST_ROWS:
            raise BadQuery(
                f"there are more than {MOST_ROWS} rows: give from, to, tenant, adapter or fewer columns", "by"
            )
        return number, found

    def close(self, batches: list[Batch]) -> None:
        """Add what is left, and close the file. Raises sqlite3.Error and OSError."""
        with self._turn:
            try:
                for batch in batches:
                    if batch.sums:
                        self._add(batch)
            finally:
                self._drop_connection()

    def _read(self, question: Question) -> tuple[int, Table]:
        where, values = _where(question)
        by, sums = ", ".join(question.by), ", ".join(f"sum({name})" for name in Numbers._fields)
        select = f"SELECT {by}, {sums} FROM usage WHERE {where} GROUP BY {by} LIMIT {MOST_ROWS + 1}"  # noqa: S608 (names of our own)
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)) as connection:
            end = time.monotonic() + READ_S
            connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
            connection.execute("BEGIN")  # the number and the rows are of one moment
            number = _newest(connection, self._process)
            rows = connection.execute(select, values).fetchall()
        return number, {row[: len(question.by)]: Numbers(*row[len(question.by) :]) for row in rows}

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                (found,) = connection.execute("PRAGMA user_version").fetchone()
                if found > FORMAT:
                    raise _OtherFormat(f"it has the format {found} of a newer astra-serve")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")  # a flush for each batch: one a second
                connection.executescript(_TABLES)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _add(self, batch: Batch) -> None:
        with self._without_damage():
            self._write(batch)
            return
        self._write(batch)  # to a new file

    def _write(self, batch: Batch) -> None:
        connection = self._opened()
        connection.execute("BEGIN IMMEDIATE")
        try:
            if _newest(connection, self._process) < batch.number:
                connection.executemany(_ADD, [(*key, *numbers) for key, numbers in batch.sums.items()])
                connection.execute("DELETE FROM newest_batch")
                connection.execute("INSERT INTO newest_batch VALUES (?, ?)", (self._process, batch.number))
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have ended it already
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _without_damage(self) -> Iterator[None]:
        """Rename the file where the block finds it damaged, and go on behind the block."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._set_aside(error)

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        """Rename the file. Raises OSError."""
        self._drop_connection()
        aside = self.path.with_name(f"{NAME}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        self.path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.path.with_name(NAME + suffix).rename(aside.with_name(aside.name + suffix))
        logger.warning("the usage ledger %s cannot be read (%s): it is now %s", self.path, error, aside.name)

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _OtherFormat(sqlite3.DatabaseError):
    """The file is that of a newer astra-serve."""


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return isinstance(error, _OtherFormat) or code in DAMAGED


def _newest(connection: sqlite3.Connection, process: str) -> int:
    """Return the number of the newest batch of a process; 0 where the file has none."""
    row = connection.execute("SELECT number FROM newest_batch WHERE process = ?", (process,)).fetchone()
    return int(row[0]) if row else 0


def _where(question: Question) -> tuple[str, list[str]]:
    """Return the condition of a question in SQL, and its values."""
    conditions, values = ["day BETWEEN ? AND ?"], [str(question.first_day), str(question.last_day)]
    for column, value in (("tenant", question.tenant), ("adapter", question.adapter)):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    return " AND ".join(conditions), values
