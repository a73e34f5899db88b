"""The ledger of usage: on disk after a kill, in memory while the disk is full, and never in the way of a request."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astra_serve.adapters.events import Events
from astra_serve.adapters.store import first_free
from astra_serve.adapters.version import Version
from astra_serve.document.keys import Tenant
from astra_serve.errors import BadQuery, Unavailable
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.caller import Caller
from astra_serve.observe import ledger_file
from astra_serve.observe.ledger import Ledger
from astra_serve.observe.ledger_file import NAME, Batch, LedgerFile
from astra_serve.observe.sums import Key, Numbers, Question
from tests.astra_serve.world import ManualClock, in_a_loop, quiet

DAY = "2026-11-28"
SECONDS = 1795824000.0  # its first
ALL = Question(date(2026, 1, 1), date(2026, 12, 31))
OWN = Caller("team", Tenant(name="team", adapters=["a"]))


def ended(model: str = "base", adapter: str | None = None, **facts: Any) -> Request:
    return Request("1", "/v1", model, None, adapter, **{"status": 200, "complete": True, **facts})  # type: ignore[arg-type]


def on_disk(folder: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / NAME)) as connection:
        return connection.execute("SELECT * FROM usage ORDER BY 1, 2, 3, 4").fetchall()


def fill(ledger: Ledger, many: int) -> None:
    """Count requests of so many tenants: rows that need pages of their own."""
    for number in range(many):
        ledger.count(ended(caller=Caller(f"{number:04}" + "x" * 60)))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Ledger]:
    def new(folder: Path = tmp_path) -> Ledger:
        fleet = SimpleNamespace(base_name="base", expected={"a"}, events=Events())
        return Ledger(LedgerFile(folder), fleet, ManualClock(), lambda: SECONDS)  # type: ignore[arg-type]

    return new


@in_a_loop
async def test_requests_are_rows_of_their_day_tenant_adapter_and_version(make, tmp_path) -> None:
    version = Version("a", "sha256:" + "1" * 64)
    async with make() as ledger:
        tokens = {"prompt_tokens": 5, "cached_tokens": 2, "output_tokens": 3}
        for _ in range(2):
            ledger.count(ended("a", "a", version=version, caller=OWN, **tokens))
        ledger.count(ended("a", "a", status=429, caller=OWN))
        ledger.count(ended())
        await ledger.write()
        ledger.count(ended(status=500))
    assert on_disk(tmp_path) == [
        (DAY, "_all", "base", "", 2, 0, 0, 0, 1, 0),
        (DAY, "team", "a", "", 1, 0, 0, 0, 0, 1),
        (DAY, "team", "a", version.name, 2, 10, 4, 6, 0, 0),
    ]


@in_a_loop
async def test_only_names_that_exist_make_rows(make) -> None:
    async with make() as ledger:
        for name in ("../etc", "=cmd", "x" * 10_000):
            ledger.count(ended(name, status=404))
        ledger.count(ended("base", status=404, caller=OWN))  # it does not exist for this tenant
        ledger.count(ended("policy-7", "policy-7", version=Version("policy-7", "sha256:" + "2" * 64)))
        found = await ledger.answer(ALL)
    assert {(key[1:], numbers.requests) for key, numbers in found.items()} == {
        (("_all", "_unknown", ""), 3),
        (("team", "_unknown", ""), 1),
        (("_all", "_other", ""), 1),
    }


@in_a_loop
async def test_an_answer_has_each_request_once_while_the_ledger_is_written(make, monkeypatch) -> None:
    async with make() as ledger:
        ledger.count(ended())
        await ledger.write()
        ledger.count(ended())
        before = ledger._file.read

        def written_meanwhile(question: Question) -> Any:
            ledger._file.add(Batch(2, {Key(DAY, "_all", "base", ""): Numbers(1)}))
            return before(question)

        monkeypatch.setattr(ledger._file, "read", written_meanwhile)
        assert (await ledger.answer(ALL))[DAY, "_all", "base", ""].requests == 2
        assert list(await ledger.answer(Question(ALL.first_day, ALL.last_day, by=("tenant",)))) == [("_all",)]
        assert not await ledger.answer(Question(ALL.first_day, ALL.last_day, tenant="other"))


def test_a_batch_that_is_added_twice_counts_once_and_another_process_counts_anew(tmp_path) -> None:
    batch = Batch(1, {Key(DAY, "_all", "base", ""): Numbers(1)})
    for _ in range(2):
        file = LedgerFile(tmp_path)
        file.add(batch)
        file.add(batch)
        file.close([batch])
    assert [row[4] for row in on_disk(tmp_path)] == [2]


def test_after_sigkill_all_but_the_last_second_is_there(tmp_path) -> None:
    command = [sys.executable, "-m", "tests.astra_serve.observe.killed_ledger", str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [row[2:] for row in on_disk(tmp_path)] == [("base", "", 5, 0, 0, 15, 0, 0)]


@in_a_loop
async def test_a_task_writes_once_a_second(make, tmp_path) -> None:
    async with make() as ledger:
        task = asyncio.create_task(ledger.run())
        ledger.count(ended())
        clock = ledger._clock
        while not clock.waited_for():
            await asyncio.sleep(0.01)
        assert on_disk(tmp_path) == []
        await clock.advance(1.0)
        while not on_disk(tmp_path):
            await asyncio.sleep(0.01)
        task.cancel()


@in_a_loop
async def test_while_the_disk_is_full_sums_stay_in_memory_and_are_written_later(make, tmp_path) -> None:
    ledger = make()
    events = ledger._fleet.events
    async with ledger:
        ledger.count(ended())
        await ledger.write()
        connection = ledger._file._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own error of a full disk
        fill(ledger, 200)
        await ledger.write()
        await ledger.write()
        assert ledger.fault.endswith("database or disk is full; its sums stay in memory")
        ledger.count(ended())
        assert sum(numbers.requests for numbers in (await ledger.answer(ALL)).values()) == 202
        connection.execute("PRAGMA max_page_count = 1000000")
        await ledger.write()
        assert [event.event for event in events.newest] == ["usage_failed", "usage_written"]
        assert ledger.fault is None
    assert sum(row[4] for row in on_disk(tmp_path)) == 202


@in_a_loop
async def test_a_folder_that_cannot_be_written_ends_nothing(make, tmp_path, caplog) -> None:
    (tmp_path / NAME).mkdir()
    async with make() as ledger:
        ledger.count(ended())
        await ledger.write()
        assert "unable to open database file" in ledger.fault
        with pytest.raises(Unavailable, match="cannot be read now"):
            await ledger.answer(ALL)
    assert "the usage of 1 requests is lost" in caplog.text


@pytest.mark.parametrize("damage", [b"not a database" * 1000, b""])
@in_a_loop
async def test_a_damaged_ledger_is_renamed_and_a_new_one_begun(make, tmp_path, damage: bytes) -> None:
    async with make() as ledger:
        fill(ledger, 200)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(damage or whole[:5000])  # the first page is there, and the others are not
    async with make() as ledger:
        ledger.count(ended())
        await ledger.write()
        assert ledger.fault is None
    assert [row[4] for row in on_disk(tmp_path)] == [1]
    (aside,) = tmp_path.glob(f"{NAME}.damaged-*")
    assert aside.read_bytes() == (damage or whole[:5000])


@in_a_loop
async def test_damage_that_a_question_finds_is_repaired_at_once(make, tmp_path) -> None:
    async with make() as ledger:
        (tmp_path / NAME).write_bytes(b"not a database" * 1000)
        with pytest.raises(Unavailable):
            await ledger.answer(ALL)
        assert not await ledger.answer(ALL)


def test_the_ledger_of_a_newer_server_is_not_changed(tmp_path) -> None:
    with closing(sqlite3.connect(tmp_path / NAME)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = (tmp_path / NAME).read_bytes()
    LedgerFile(tmp_path).close([Batch(1, {Key(DAY, "_all", "base", ""): Numbers(1)})])
    (aside,) = tmp_path.glob(f"{NAME}.damaged-*")
    assert aside.read_bytes() == before


@in_a_loop
async def test_an_answer_of_too_many_rows_is_refused(make, monkeypatch) -> None:
    monkeypatch.setattr(ledger_file, "MOST_ROWS", 3)
    async with make() as ledger:
        fill(ledger, 4)
        await ledger.write()
        with pytest.raises(BadQuery, match="more than 3 rows"):
            await ledger.answer(ALL)
        assert len(await ledger.answer(Question(ALL.first_day, ALL.last_day, by=("day",)))) == 1


@in_a_loop
async def test_a_question_that_takes_too_long_is_given_up(make, monkeypatch) -> None:
    monkeypatch.setattr(ledger_file, "READ_S", -1.0)
    async with make() as ledger:
        fill(ledger, 5000)
        await ledger.write()
        with pytest.raises(Unavailable):
            await ledger.answer(ALL)


@in_a_loop
async def test_servers_of_one_shared_store_have_a_ledger_each(make, tmp_path) -> None:
    stores = [first_free(tmp_path) for _ in range(2)]
    ledgers = [make(store.root) for store in stores]
    for ledger in ledgers:
        ledger.count(ended())
    for ledger in ledgers:
        await ledger.write()
        await quiet()
    assert [len(on_disk(store.root)) for store in stores] == [1, 1]
    for ledger, store in zip(ledgers, stores, strict=True):
        await ledger.__aexit__()
        store.close()
