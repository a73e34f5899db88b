"""`GET /usage` on both ports: whose rows a key reads, JSON and CSV, and refusals as the official client sees them."""

import csv
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from astra_serve.control import policy_port
from astra_serve.document.keys import Keys, hash_of
from astra_serve.gateway.request import Request
from astra_serve.gateway.routes import SERVED
from astra_serve.gateway.tenancy.authentication import Authentication
from astra_serve.gateway.tenancy.caller import Caller
from astra_serve.gateway.tenancy.keyring import Keyring
from astra_serve.observe import usage
from astra_serve.observe.ledger import Ledger
from astra_serve.observe.ledger_file import LedgerFile
from tests.astra_serve.world import INFO, POLICY_TOKEN, World, in_a_loop, server

SECONDS = 1795824000.0  # 2026-11-28
TENANTS = {
    "team": {"usage": True, "adapters": ["a"]},
    "other": {"usage": True, "adapters": ["a"]},
    "quiet": {"adapters": ["a"]},
}


class Ports:
    """The admin port and the public port of a server with three tenants, and the operator's key."""

    def __init__(self, world: World, ledger: Ledger, keyring: Keyring) -> None:
        self.world, self.ledger = world, ledger
        self.public_app = FastAPI()
        usage.for_tenants(self.public_app, ledger)
        self._authenticated = Authentication(self.public_app, keyring)
        world.admin_app.include_router(usage.for_operators(ledger))

    def use(self, tenant: str, adapter: str, tokens: int) -> None:
        facts: dict[str, Any] = {"status": 200, "complete": True, "prompt_tokens": tokens, "caller": Caller(tenant)}
        self.ledger.count(Request("1", "/v1", adapter, None, adapter, **facts))  # type: ignore[arg-type]

    async def public(self, key: str, **query: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self._authenticated)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as http:
            return await http.get("/usage", params=query)

    async def admin(self, **query: str) -> httpx.Response:
        return await self.world.api.get("/usage", params=query)

    def official(self, key: str) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(self._authenticated))
        return openai.AsyncOpenAI(base_url="http://x", api_key=key, http_client=http)


@pytest.fixture
def ports(engine, store, base, tmp_path) -> Callable[[], Any]:
    @asynccontextmanager
    async def make() -> AsyncIterator[Ports]:
        keyring = Keyring(["operator-key"], follows=True)
        tenants = [{"name": name, "keys": [{"hash": hash_of(f"{name}-key")}], **more} for name, more in TENANTS.items()]
        keyring.replace(Keys.model_validate({"tenants": tenants}))
        async with (
            server(engine, store, base, tmp_path / "adapters.yaml") as world,
            Ledger(LedgerFile(store.root), world.fleet, world.clock, lambda: SECONDS) as ledger,
        ):
            world.fleet.expected.update({"a", "b/c"})
            found = Ports(world, ledger, keyring)
            found.use("team", "a", 5)
            found.use("team", "b/c", 6)
            found.use("other", "a", 7)
            found.use("_all", "a", 8)
            yield found

    return make


def tokens(answer: httpx.Response) -> dict[tuple[str, str], int]:
    assert answer.status_code == 200, answer.text
    return {(row["tenant"], row["adapter"]): row["prompt_tokens"] for row in answer.json()["rows"]}


@in_a_loop
async def test_a_tenant_reads_its_own_rows_and_no_others(ports) -> None:
    async with ports() as p:
        assert tokens(await p.public("team-key")) == {("team", "a"): 5, ("team", "b/c"): 6}
        assert tokens(await p.public("team-key", tenant="team", adapter="b/c")) == {("team", "b/c"): 6}
        assert tokens(await p.public("other-key")) == {("other", "a"): 7}
        refused = [await p.public("team-key", tenant=name) for name in ("other", "_all", "nobody", "")]
        assert [answer.status_code for answer in refused] == [403] * 4
        assert len({answer.text for answer in refused}) == 1  # it says nothing about who exists
        total = (await p.public("team-key", by="tenant")).json()
        assert total["total"]["prompt_tokens"] == total["rows"][0]["prompt_tokens"] == 11


@in_a_loop
async def test_the_operators_key_and_the_admin_port_read_all_rows(ports) -> None:
    async with ports() as p:
        everything = {("team", "a"): 5, ("team", "b/c"): 6, ("other", "a"): 7, ("_all", "a"): 8}
        assert tokens(await p.public("operator-key")) == everything
        assert tokens(await p.admin()) == everything
        assert tokens(await p.admin(tenant="other")) == {("other", "a"): 7}
        assert tokens(await p.admin(**{"from": "2026-11-29", "to": "2026-11-30"})) == {}
        by_day = (await p.admin(by="day")).json()
        assert (by_day["by"], by_day["rows"][0]["day"], by_day["rows"][0]["requests"]) == (["day"], "2026-11-28", 4)
        p.world.api.headers["Authorization"] = "Bearer team-key"
        assert (await p.admin()).status_code == 401


@in_a_loop
async def test_the_official_client_raises_its_own_errors(ports) -> None:
    async with ports() as p:
        for key, error in (
            ("wrong", openai.AuthenticationError),
            ("quiet-key", openai.PermissionDeniedError),
        ):
            with pytest.raises(error) as raised:
                await p.official(key).get("/usage", cast_to=httpx.Response)
            assert raised.value.body["type"] == type(raised.value).__name__
        with pytest.raises(openai.BadRequestError, match="is no day"):
            await p.official("team-key").get("/usage?from=x", cast_to=httpx.Response)
        assert (await p.public("")).status_code == 401


@in_a_loop
async def test_a_trainer_may_use_every_model_and_reads_no_usage(ports) -> None:
    async with ports() as p:
        app = policy_port.build(p.world.policies, p.public_app, INFO, POLICY_TOKEN)
        auth = ("x", POLICY_TOKEN)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", auth=auth) as trainer:
            assert (await trainer.get("/usage")).status_code == 403


@pytest.mark.parametrize(
    ("query", "param"),
    [({"to": "2026-13-01"}, "to"), ({"format": "xml"}, "format"), ({"by": "model"}, "by"), ({"day": "x"}, "day")],
)
@in_a_loop
async def test_a_wrong_parameter_is_400_in_openais_form_on_both_ports(ports, query: dict[str, str], param: str) -> None:
    async with ports() as p:
        for answer in (await p.admin(**query), await p.public("team-key", **query)):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"], error["type"]) == (400, 400, param, "BadQuery")


@in_a_loop
async def test_csv_has_a_header_and_no_cell_that_a_spreadsheet_computes(ports) -> None:
    async with ports() as p:
        p.use("team", "=1+1", 1)  # no adapter is called so
        answer = await p.admin(format="csv")
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        header, *rows = csv.reader(io.StringIO(answer.text))
        assert header[:6] == ["day", "tenant", "adapter", "version", "requests", "prompt_tokens"]
        assert ["2026-11-28", "team", "b/c", "", "1", "6", "0", "0", "0", "0"] in rows
        assert all(cell == "" or cell[0].isalnum() or cell[0] == "_" for row in rows for cell in row)


@in_a_loop
async def test_operators_and_no_tenants_see_that_the_ledger_cannot_be_written(ports) -> None:
    async with ports() as p:
        p.ledger.fault = "the disk is full"
        assert (await p.admin()).json()["fault"] == "the disk is full"
        assert (await p.public("team-key")).json()["fault"] is None


def test_the_public_route_is_one_of_those_that_are_served() -> None:
    assert SERVED.fullmatch(usage.PATH)
