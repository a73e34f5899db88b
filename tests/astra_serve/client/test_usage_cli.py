"""`astra-serve usage` against real admin ports, with a stand-in for the engine behind them."""

import asyncio
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astra_serve.cli import main
from astra_serve.client import Client
from astra_serve.client.state import Usage, UsageNumbers, UsageRow
from astra_serve.client.usage_cli import summed
from astra_serve.errors import BadQuery
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.caller import Caller
from astra_serve.observe import usage
from astra_serve.observe.ledger import Ledger
from astra_serve.observe.ledger_file import LedgerFile
from tests.astra_serve.client.conftest import Admin
from tests.astra_serve.world import TOKEN
from tests.support.server import free_port

SECONDS = 1795824000.0  # 2026-11-28
ROW = ["2026-11-28", "team", "base", "", "2", "10", "4", "2000", "0", "0"]


@pytest.fixture
def url(admin: Admin, tmp_path: Path) -> Iterator[str]:
    """Return the admin port of a server that two tenants have used."""
    fleet = admin.world.fleet
    ledger = Ledger(LedgerFile(tmp_path), fleet, admin.world.clock, lambda: SECONDS)
    facts: dict[str, Any] = {"status": 200, "complete": True, "prompt_tokens": 5, "cached_tokens": 2}
    for tenant in ("team", "team", "other"):
        asked = Request("1", "/v1", fleet.base_name, None, output_tokens=1000, caller=Caller(tenant), **facts)  # type: ignore[arg-type]
        ledger.count(asked)
    admin.world.admin_app.include_router(usage.for_operators(ledger))
    yield admin.url
    asyncio.run_coroutine_threadsafe(ledger.__aexit__(), admin.loop).result(10)


def run(*words: str) -> int:
    return main(["usage", *words])


def test_a_table_shows_the_rows_and_their_total(url: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run("--url", url) == 0
    lines = capsys.readouterr().out.splitlines()
    (team,) = (line for line in lines if "team" in line)
    (total,) = (line for line in lines if "total" in line)
    assert [cell.strip() for cell in team.split("│")[1:-1]][4:8] == ["2", "10", "4", "2,000"]
    assert [cell.strip() for cell in total.split("│")[1:-1]][4:8] == ["3", "15", "6", "3,000"]
    assert "2026-10-29 to 2026-11-28 (UTC)" in lines[-1]


def test_csv_and_json_are_for_scripts(url: str, base, capsys) -> None:
    assert run("--url", url, "--csv", "--tenant", "team") == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == [
        *("day", "tenant", "adapter", "version"),
        *("requests", "prompt_tokens", "cached_tokens", "output_tokens", "errors", "limited"),
    ]
    assert rows == [[base.name if cell == "base" else cell for cell in ROW]]
    assert run("--url", url, "--json", "--by", "tenant", "--from", "2026-11-28", "--adapter", base.name) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["tenant"], row["requests"], row["day"]) for row in found["rows"]] == [
        ("other", 1, None),
        ("team", 2, None),
    ]
    assert (found["first_day"], found["total"]["requests"]) == ("2026-11-28", 3)


def test_the_sums_of_replicas_are_added_and_none_may_be_absent(url: str, capsys) -> None:
    assert run("--url", url, "--url", url.replace("127.0.0.1", "localhost"), "--csv", "--by", "day") == 0
    assert capsys.readouterr().out.splitlines()[1] == "2026-11-28,6,30,12,6000,0,0"
    gone = f"http://127.0.0.1:{free_port()}"
    assert run("--url", url, "--url", gone) == 1
    assert gone in capsys.readouterr().err


def test_replicas_that_have_different_rows_are_one_table() -> None:
    def of(tenant: str, requests: int, fault: str | None = None) -> Usage:
        numbers = (requests, 0, 0, 0, 0, 0)
        rows = (UsageRow(*numbers, tenant=tenant),)
        return Usage("2026-11-01", "2026-11-28", ("tenant",), rows, UsageNumbers(*numbers), fault)

    found = summed([of("b", 1), of("a", 2, "full"), of("b", 4)])
    assert [(row.tenant, row.requests) for row in found] == [("a", 2), ("b", 5)]
    assert (found.total.requests, found.fault) == (7, "full")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--from", "yesterday"), "'yesterday' is no day: write it as 2026-11-28"),
        (("--by", "model"), "'model' are no columns: give some of day,tenant,adapter,version"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(words: tuple[str, ...], reason: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_without_a_token_nothing_is_asked(monkeypatch, capsys) -> None:
    monkeypatch.delenv("ASTRA_ADMIN_TOKEN", raising=False)
    assert run() == 2
    assert "ASTRA_ADMIN_TOKEN" in capsys.readouterr().err


def test_the_client_raises_the_servers_error(url: str) -> None:
    with Client(url, TOKEN) as client:
        assert client.usage(by=["day"]).total.requests == 3
        with pytest.raises(BadQuery, match="is after to"):
            client.usage(first_day="2026-11-28", last_day="2026-11-27")
