"""The keys document is followed: whose key opens what, now."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from astra_serve.adapters.events import Events
from astra_serve.adapters.fetch import Sources
from astra_serve.control.tenant_keys import TenantKeys
from astra_serve.document.keys import hash_of
from astra_serve.gateway.tenancy.keyring import Keyring
from tests.astra_serve.world import ManualClock, in_a_loop, running


def document(*keys: str, tenant: str = "search") -> str:
    hashes = ", ".join(f"{{hash: '{hash_of(key)}'}}" for key in keys)
    return f"tenants: [{{name: {tenant}, keys: [{hashes}]}}]"


@dataclass
class Door:
    """A keys document that is followed, and the tenants that its keys open the server for."""

    keys: TenantKeys
    keyring: Keyring
    events: Events
    clock: ManualClock
    file: Path

    def opens(self, key: str) -> str | None:
        found = self.keyring.caller(Headers({"Authorization": f"Bearer {key}"}))
        return found.name if found else None

    async def until(self, key: str, tenant: str | None) -> None:
        """Wait for the file system's report, which needs no time of the clock."""
        async with asyncio.timeout(10):
            while self.opens(key) != tenant:
                await asyncio.sleep(0.01)


@pytest.fixture
def door(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[Door]]:
    @asynccontextmanager
    async def make(text: str | None = None) -> AsyncIterator[Door]:
        file, clock, events = tmp_path / "keys" / "keys.yaml", ManualClock(), Events()
        file.parent.mkdir()
        if text is not None:
            file.write_text(text)
        keyring = Keyring(["operator"], follows=True)
        keys = TenantKeys(str(file), keyring, events, clock, Sources())
        async with running(keys):
            while not (keys.read_once or keys.fault):
                await asyncio.sleep(0.01)
            yield Door(keys, keyring, events, clock, file)

    return make


@in_a_loop
async def test_a_key_is_added_rotated_and_revoked_without_a_restart(door) -> None:
    async with door(document("old")) as d:
        assert (d.opens("old"), d.opens("new"), d.opens("operator")) == ("search", None, "_all")
        for text, key, tenant in (
            (document("old", "new"), "new", "search"),
            (document("new"), "old", None),
            (document("new", tenant="billing"), "new", "billing"),
        ):
            (d.file.parent / "next").write_text(text)
            (d.file.parent / "next").replace(d.file)
            await d.until(key, tenant)


@in_a_loop
async def test_a_mounted_secret_is_followed(door) -> None:
    """Kubernetes replaces the link `..data`, through which the file is a link."""
    async with door(document("old")) as d:
        folder = d.file.parent
        for number, text in enumerate((document("old"), document("new"))):
            (folder / f"..{number}").mkdir()
            (folder / f"..{number}" / "keys.yaml").write_text(text)
        (folder / "..data").symlink_to("..0")
        d.file.unlink()
        d.file.symlink_to("..data/keys.yaml")
        (folder / "..next").symlink_to("..1")
        (folder / "..next").replace(folder / "..data")
        await d.until("new", "search")
        assert d.opens("old") is None


@pytest.mark.parametrize("text", [None, "", "tenants: [", "tenant: []", "tenants: [{name: a, keyz: []}]", "[]"])
@in_a_loop
async def test_a_document_that_cannot_be_read_at_start_lets_nobody_in(door, text: str | None) -> None:
    async with door(text) as d:
        (reason,) = d.keys.not_ready()
        assert reason.startswith(f"the keys document has not been read: {d.file}")
        assert (d.opens("old"), d.opens("operator")) == (None, "_all")
        assert [(event.event, event.reason) for event in d.events.newest] == [("keys_failed", d.keys.fault)]
        d.file.write_text(document("old"))
        await d.until("old", "search")
        assert (d.keys.not_ready(), d.keys.fault) == ([], None)


@in_a_loop
async def test_a_fault_later_keeps_the_last_good_document(door) -> None:
    async with door(document("old")) as d:
        for text in ("tenants: [{name: a, weight: -1}]", "", "tenants: [{name: a}, {name: a}]"):
            fault = d.keys.fault
            d.file.write_text(text)
            async with asyncio.timeout(10):
                while d.keys.fault in (None, fault):
                    await asyncio.sleep(0.01)
            assert (d.opens("old"), d.keys.not_ready()) == ("search", [])
            assert d.events.newest[-1].event == "keys_failed"
        d.file.unlink()
        await d.keys.refresh()
        assert d.opens("old") == "search"
