"""`GET /usage`: the ledger as JSON or CSV, on the admin port of every tenant, on the public port of the one that asks.

    from, to     days of UTC, both included; by default the last 31
    tenant, adapter
    by           the columns of a row, of day,tenant,adapter,version; by default all
    format       json (default) or csv

A key of a tenant whose `usage` is true reads its own rows; any other key of a tenant gets 403. Keys of --api-key read
all rows, as they use all models. A cell of the CSV begins with a letter, a digit or `_`: no spreadsheet takes it for a
formula.
"""

import asyncio
import csv
import io
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response

from astra_serve.errors import BadQuery, Unavailable
from astra_serve.gateway.errors import error_body
from astra_serve.gateway.tenancy import caller
from astra_serve.observe.ledger import Ledger, total
from astra_serve.observe.sums import Numbers, Question, Table, question

PATH = "/usage"


def for_operators(ledger: Ledger) -> APIRouter:
    """Return the route of the admin port."""
    router = APIRouter()

    @router.get(PATH)
    async def usage(request: Request) -> Response:
        return await _answer(ledger, dict(request.query_params), "an operator", ledger.fault)

    return router


def for_tenants(app: FastAPI, ledger: Ledger) -> None:
    """Add the route of the public port."""

    async def usage(request: Request) -> Response:
        """Return the usage of the tenant whose key the request has."""
        who, given = caller.current.get(), dict(request.query_params)
        if not who.may_read_usage:
            return _error(403, "this key may not read usage: see `usage` of the keys document")
        if who.tenant is not None and given.setdefault("tenant", who.name) != who.name:
            return _error(403, f"this key may read the usage of {who.name} alone", "tenant")
        return await _answer(ledger, given, who.name)

    app.add_api_route(PATH, usage, methods=["GET"])


async def _answer(ledger: Ledger, given: dict[str, str], asked_by: str, fault: str | None = None) -> Response:
    form = given.get("format", "json")
    try:
        if form not in ("json", "csv"):
            raise BadQuery(f"format={form[:64]} is unknown: give json or csv", "format")
        asked = question(given, ledger.today())
        table = await ledger.answer(asked, asked_by)
    except BadQuery as error:
        return _error(400, str(error), error.param, type(error).__name__)
    except Unavailable as error:
        return _error(503, str(error))
    # Large tables are made texts in a thread: the streams of other requests go on.
    if form == "csv":
        return Response(await asyncio.to_thread(_csv, asked, table), media_type="text/csv")
    return await asyncio.to_thread(lambda: JSONResponse({**_json(asked, table), "fault": fault}))


def _json(asked: Question, table: Table) -> dict[str, Any]:
    rows = [{**dict(zip(asked.by, key, strict=True)), **numbers._asdict()} for key, numbers in table.items()]
    days = {"first_day": str(asked.first_day), "last_day": str(asked.last_day)}
    return {**days, "by": asked.by, "rows": rows, "total": total(table)._asdict()}


def _csv(asked: Question, table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*asked.by, *Numbers._fields])
    writer.writerows([*key, *numbers] for key, numbers in table.items())
    return text.getvalue()


def _error(status: int, message: str, param: str | None = None, kind: str | None = None) -> Response:
    return Response(error_body(status, message, param, kind), status, media_type="application/json")
