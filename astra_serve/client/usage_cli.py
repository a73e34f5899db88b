"""`astra-serve usage`: the usage of all replicas together, as a table, CSV or JSON."""

import argparse
import asyncio
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from datetime import date

from rich.console import Console
from rich.table import Table
from rich.text import Text

from astra_serve.client import calls, exchange, replicas
from astra_serve.client.client import DEFAULT_URL, TIMEOUT_S
from astra_serve.client.exchange import Call
from astra_serve.client.state import Usage, UsageNumbers, UsageRow
from astra_serve.environment import ADMIN_TOKEN, ADMIN_URL
from astra_serve.errors import ServeError

COLUMNS = ("day", "tenant", "adapter", "version")
NUMBERS = tuple(field.name for field in fields(UsageNumbers))


def main(argv: list[str]) -> int:
    """Show the usage; return 0, 1 without an answer of every server, 2 for bad input."""
    args = _parser().parse_args(argv)
    urls = args.url or os.environ.get(ADMIN_URL, "").replace(",", " ").split() or [DEFAULT_URL]
    try:
        token = exchange.checked_token(None)
        for url in urls:
            exchange.admin_url(url)
    except ServeError as error:
        return _failed(error, 2)
    try:
        call = calls.usage(
            first_day=args.first_day, last_day=args.last_day, tenant=args.tenant, adapter=args.adapter, by=args.by
        )
        found = summed(asyncio.run(_of_all(urls, token, args.timeout, call)))
    except ServeError as error:
        return _failed(error, 1)
    if args.json:
        print(json.dumps(asdict(found), indent=2))
    elif args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([*found.by, *NUMBERS])
        writer.writerows([getattr(row, name) for name in (*found.by, *NUMBERS)] for row in found)
    else:
        _show(found)
    return 0


def summed(answers: Sequence[Usage]) -> Usage:
    """Return the usage of several replicas as one; `answers` have the same question."""
    first = answers[0]
    rows: dict[tuple[str | None, ...], list[int]] = {}
    for answer in answers:
        for row in answer:
            key = tuple(getattr(row, name) for name in first.by)
            rows[key] = _plus(rows.get(key, [0] * len(NUMBERS)), row)
    faults = "; ".join(answer.fault for answer in answers if answer.fault)
    return Usage(
        min(answer.first_day for answer in answers),  # two replicas may see midnight between their answers
        max(answer.last_day for answer in answers),
        first.by,
        tuple(_row(first.by, key, rows[key]) for key in sorted(rows, key=str)),
        UsageNumbers(*_total(answer.total for answer in answers)),
        faults or None,
    )


def _row(by: tuple[str, ...], key: tuple[str | None, ...], numbers: list[int]) -> UsageRow:
    names = dict(zip(by, key, strict=True))
    return UsageRow(*numbers, *(names.get(name) for name in COLUMNS))  # type: ignore[arg-type]


async def _of_all(urls: list[str], token: str, timeout_s: float, call: Call[Usage]) -> list[Usage]:
    """Return the answers of all servers. Raises ServeError where one has none: the sums would be too small."""
    async with replicas.connect(urls, token, timeout_s) as found:
        return await replicas.of_all(found, lambda replica: replica.ask(call))


def _total(numbers: Iterable[UsageNumbers]) -> list[int]:
    found = [0] * len(NUMBERS)
    for one in numbers:
        found = _plus(found, one)
    return found


def _plus(numbers: list[int], other: UsageNumbers) -> list[int]:
    return [number + getattr(other, name) for name, number in zip(NUMBERS, numbers, strict=True)]


def _show(found: Usage) -> None:
    console = Console()
    table = Table(*found.by, show_footer=True, caption=f"{found.first_day} to {found.last_day} (UTC)")
    for name in NUMBERS:
        table.add_column(name.replace("_tokens", ""), f"{getattr(found.total, name):,}", justify="right")
    for row in found:
        names = [Text(getattr(row, name) or "") for name in found.by]
        table.add_row(*names, *(f"{getattr(row, name):,}" for name in NUMBERS))
    if found.by:
        table.columns[0].footer = "total"
    console.print(table)
    if found.fault:
        console.print(Text(found.fault), soft_wrap=True)


def _failed(reason: object, status: int) -> int:
    print(f"astra-serve usage: {reason}", file=sys.stderr)
    return status


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no day: write it as 2026-11-28") from error


def _columns(text: str) -> tuple[str, ...]:
    found = tuple(name for name in COLUMNS if name in text.split(","))
    if not found or set(text.split(",")) > set(found):
        raise argparse.ArgumentTypeError(f"{text!r} are no columns: give some of {','.join(COLUMNS)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-serve usage",
        description="Show the requests and tokens of each day, tenant, adapter and version.",
        epilog=f"The admin token is read from {ADMIN_TOKEN}. `cached`: tokens of prompts, from the prefix cache.",
        allow_abbrev=False,
    )
    add_ = parser.add_argument
    url = f"the admin port ({ADMIN_URL}, {DEFAULT_URL}); repeated for replicas, whose sums are added up"
    add_("--url", action="append", metavar="URL", help=url)
    first = "the first day of UTC, as 2026-11-28 (default: 30 before the last)"
    add_("--from", dest="first_day", type=_day, metavar="DAY", help=first)
    add_("--to", dest="last_day", type=_day, metavar="DAY", help="the last day (default: today)")
    add_("--tenant", metavar="NAME", help="this one alone")
    add_("--adapter", metavar="NAME", help="this one alone")
    add_("--by", type=_columns, metavar="COLUMNS", help=f"the columns of the rows (default: {','.join(COLUMNS)})")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print rows of CSV, with a header")
    form.add_argument("--json", action="store_true", help="print JSON")
    add_("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds to wait (default: 600)")
    return parser
