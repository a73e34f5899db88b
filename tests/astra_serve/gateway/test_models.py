"""The models that requests may name."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from fastapi import FastAPI

from astra_serve.adapters import fleet
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.version import Alias, Version
from astra_serve.gateway.models import PATH, Models
from tests.astra_serve.world import in_a_loop, memory

ONE, TWO = (Version("sql", "sha256:" + 64 * digit) for digit in "12")
Shown = Callable[..., AbstractAsyncContextManager[tuple[openai.AsyncOpenAI, Fleet]]]


@pytest.fixture
def shown(engine, store, base) -> Shown:
    """Return OpenAI's client of a server with both handlers, and its fleet, whose `sql` is an adapter."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Any]:
        async with memory(engine, store, base) as m:
            m.fleet.point("sql", Alias(ONE), 1)
            app, models = FastAPI(), Models(m.fleet, 2048)
            app.add_api_route(PATH, models.show_all, methods=["GET"])
            app.add_api_route(PATH + "/{model:path}", models.show, methods=["GET"])
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
                yield openai.AsyncOpenAI(base_url="http://x/v1", api_key="k", http_client=http, max_retries=0), m.fleet

    return make


@in_a_loop
async def test_the_base_and_each_adapter_are_listed_without_paths(shown, base) -> None:
    async with shown() as (client, _):
        base_card, sql = (await client.models.list()).data
        assert (base_card.id, base_card.model_extra) == (
            base.name,
            {"root": base.name, "parent": None, "max_model_len": 2048},
        )
        assert (sql.id, sql.model_extra) == ("sql", {"root": ONE.name, "parent": base.name, "max_model_len": 2048})


@in_a_loop
async def test_one_model_is_retrieved_by_each_name_that_requests_may_use(shown, base) -> None:
    async with shown() as (client, names):
        for model, root in ((base.name, base.name), ("sql", ONE.name), ("sql@11111111", ONE.name)):
            card = await client.models.retrieve(model)
            assert (card.id, (card.model_extra or {})["root"]) == (model, root)
        names.point("team/sql", Alias(Version("team/sql", ONE.digest)), 1)
        for name in ("team/sql", "team/sql@11111111"):
            assert (await client.models.retrieve(name)).id == name  # %2F or a slash: OpenAI's client may send either
            answer = await client.get(f"/models/{quote(name, safe='')}", cast_to=httpx.Response)
            assert answer.json()["root"] == "team/sql@111111111111"
        names.base_name = "org/base"
        assert (await client.models.retrieve("org/base")).id == "org/base"
        with pytest.raises(openai.NotFoundError, match=r"did you mean 'sql'\?"):
            await client.models.retrieve("sqll")
        names.complete = False
        with pytest.raises(openai.InternalServerError, match="the document has not been read") as error:
            await client.models.retrieve("sqll")
        assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "5")


@in_a_loop
async def test_one_adapter_names_the_digest_and_the_proof_of_its_version(shown, store, write_lora) -> None:
    async with shown() as (client, names):
        version = Version("sql", store.add(write_lora("one", 1.0)))
        names.point("sql", Alias(version), 1)

        async def proof() -> dict[str, Any]:
            card = (await client.models.retrieve("sql")).model_extra or {}
            assert card["digest"] == version.digest
            return card["proof"]

        assert await proof() == {"state": "unproved"}
        async with names.lease("sql"):
            assert await proof() == {
                "state": "proved", "recorded": False, "prompts": 8, "effect": 1.0, "deviation": None
            }  # fmt: skip
        names.residency.of(version).failed = "/a/path: is gone"
        assert await proof() == {**await proof(), "state": "failed"}
        assert "path" not in str(await proof())


@in_a_loop
async def test_created_is_when_the_version_began_to_serve(shown, monkeypatch) -> None:
    async with shown() as (client, names):
        first = (await client.models.retrieve("sql")).created
        monkeypatch.setattr(fleet.time, "time", lambda: 9e9)
        names.point("sql", Alias(ONE, pinned=True), 1)
        assert (await client.models.retrieve("sql")).created == first
        names.point("sql", Alias(TWO), 1)
        assert (await client.models.retrieve("sql")).created == 9e9
