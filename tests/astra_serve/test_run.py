"""A server put together from its real parts; the engine is a stand-in, and vLLM's application an empty one."""

import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from astra_serve import run
from astra_serve.adapters.store import Store
from astra_serve.control.housekeeping import Housekeeping
from astra_serve.document.desired import Adapter, Document
from astra_serve.engine import options
from astra_serve.errors import EngineLost, InUse, ServeError
from astra_serve.gateway.request import Request
from tests.astra_serve.stand_in import StandInEngine
from tests.astra_serve.world import gateway
from tests.support.server import free_port

Serve = Callable[..., None]


@pytest.fixture
def serve(engine: StandInEngine, base, tiny_base, tmp_path: Path, monkeypatch) -> Serve:
    """Return `run.serve` on free ports, with `document`, an admin port if it is a path, and a policy port."""

    @asynccontextmanager
    async def started(*_: Any) -> AsyncIterator[StandInEngine]:
        yield engine

    async def application(_client: Any, _args: Any, fleet: Any, subscribers: Any, *_: Any) -> Any:
        call.subscribers = subscribers  # type: ignore[attr-defined]
        return FastAPI(), gateway(fleet, None, subscribers)

    async def watch() -> None:
        await engine.died.wait()
        raise EngineLost("the engine has died: its log says why; start the server again")

    client = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=False))
    engine.watch, engine.client, engine.not_ready = watch, client, list
    monkeypatch.setattr(run.vllm, "started", started)
    monkeypatch.setattr(run.vllm_seams, "application", application)
    monkeypatch.setattr(run.vllm_seams, "server_info", lambda _: {"parallel_config": {"world_size": 1}})
    ports = free_port(), free_port(), free_port()
    args = options.parse(str(tiny_base), 0, 1, 0, ["--host", "127.0.0.1", "--port", str(ports[0])])

    def call(document: Document | Path, *, trains: bool = False) -> None:
        settings = run.Settings(
            document=document if isinstance(document, Document) else str(document),
            store=tmp_path / "run-store",
            store_shared=False,
            resident=2,
            drain_s=1.0,
            engine_timeout_s=300.0,
            roots=(tmp_path,),
            admin=("127.0.0.1", ports[1]) if isinstance(document, Path) else None,
            admin_token="token",  # noqa: S106
            policies=("127.0.0.1", ports[2]) if trains else None,
            policy_token="policy",  # noqa: S106
            upload_to=None,
            keys=None,
            max_body=None,
            limits_store=None,
        )
        monkeypatch.setattr(run, "REGISTRY", CollectorRegistry())
        run.serve(args, base, settings)

    call.args = args  # type: ignore[attr-defined]
    call.url, call.admin, call.policies = (f"http://127.0.0.1:{port}" for port in ports)  # type: ignore[attr-defined]
    return call


def beside(work: Callable[[], None]) -> threading.Thread:
    """Run `work` in a thread that ends the server afterwards: the server needs the main thread's signals."""

    def then_end() -> None:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=then_end)
    thread.start()
    return thread


def answer(url: str, **settings: Any) -> httpx.Response:
    """Ask until the server answers."""
    while True:
        try:
            return httpx.get(url, **settings)
        except httpx.TransportError:
            threading.Event().wait(0.02)


def test_a_server_answers_on_both_ports_and_ends_with_a_signal(serve, tmp_path, write_lora) -> None:
    document = tmp_path / "adapters.yaml"
    document.write_text(f"adapters: [{{name: a, required: true, source: {write_lora('one', 1.0)}}}]")
    seen: list[Any] = []

    def ask() -> None:
        while (ready := answer(f"{serve.url}/readyz")).status_code == 503:
            seen.append(ready.json()["reasons"])
        seen.append(ready.json())
        seen.append(httpx.get(f"{serve.url}/livez").json())
        headers = {"Authorization": "Bearer token"}
        seen.append(answer(f"{serve.admin}/adapters", headers=headers).json())
        for subscriber in serve.subscribers.ended:
            subscriber(Request("1", "/v1", "a", None, "a", status=200, complete=True))
        seen.append(httpx.get(f"{serve.admin}/usage", headers=headers).json())
        seen.append(httpx.get(f"{serve.url}/usage").json())

    thread = beside(ask)
    serve(document)
    thread.join()
    *_, ready, alive, adapters, usage, own = seen
    assert usage["rows"] == own["rows"]
    with closing(sqlite3.connect(tmp_path / "run-store" / "usage.sqlite")) as ledger:  # all of it, at an orderly end
        assert ledger.execute("SELECT tenant, adapter, requests FROM usage").fetchall() == [("_all", "a", 1)]
    assert (ready, alive) == ({"ready": True, "reasons": []}, {"alive": True})
    assert adapters["adapters"][0]["state"] == "serving"


def test_vllm_which_prints_its_arguments_does_not_get_the_api_keys(serve, monkeypatch) -> None:
    seen: list[Any] = []

    def bound(args: Any, *_: Any) -> None:
        seen.append((args.api_key, os.environ.get("VLLM_API_KEY")))
        raise ServeError("no port")

    serve.args.api_key = ["a-key"]
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    monkeypatch.setattr(run.server, "bound", bound)
    with pytest.raises(ServeError, match="no port"):
        serve(Document())
    assert seen == [(None, None)]


def test_a_trainer_loads_a_policy_that_is_gone_when_the_server_ends(serve, write_lora, tmp_path) -> None:
    url, seen = serve.policies.replace("//", "//x:policy@"), []
    body = {"lora_name": "p-v1", "lora_path": str(write_lora("one", 1.0))}

    def train() -> None:
        seen.append(answer(f"{url}/readyz").status_code)
        seen.append(httpx.post(f"{url}/v1/load_lora_adapter", json=body).json()["state"])
        seen.append(len(list((tmp_path / "run-store" / "passing" / "versions").iterdir())))
        seen.append(httpx.get(f"{serve.policies}/readyz").status_code)
        seen.append(httpx.post(f"{serve.url}/v1/load_lora_adapter", json=body).status_code)

    thread = beside(train)
    serve(Document(), trains=True)
    thread.join()
    assert seen == [200, "serving", 1, 401, 404]
    assert not (tmp_path / "run-store" / "passing").exists()


def test_a_signal_ends_a_server_whose_sources_hang(serve, tmp_path, write_lora) -> None:
    """During a publish: the document is as it was before, and the store has nothing of it."""
    document, began = tmp_path / "adapters.yaml", []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        text = f"adapters: [{{name: a, source: {write_lora('one', 1.0)}}}, {{name: hung, source: '{url}/hung'}}]"
        document.write_text(text)
        asked: list[httpx.Response | Exception] = []

        def publish() -> None:
            try:
                asked.append(httpx.put(f"{serve.admin}/adapters/b", json={"source": f"{url}/b"}, **headers))
            except httpx.TransportError as error:
                asked.append(error)

        def ask() -> None:
            while answer(f"{serve.admin}/adapters/a", **headers).json().get("state") != "serving":
                threading.Event().wait(0.02)
            publishing = threading.Thread(target=publish)
            publishing.start()
            while answer(f"{serve.admin}/adapters/b", **headers).json().get("state") != "fetching":
                threading.Event().wait(0.02)
            began.append(time.monotonic())

        headers = {"headers": {"Authorization": "Bearer token"}, "timeout": 100}
        thread = beside(ask)
        serve(document)
        assert time.monotonic() - began[0] < 30  # of 60 without a byte
        thread.join()
        assert document.read_text() == text
    again = Store(tmp_path / "run-store")
    assert len(list((tmp_path / "run-store" / "versions").iterdir())) == 1
    again.close()


def test_a_part_that_fails_ends_the_server_with_its_reason(serve, tmp_path, monkeypatch) -> None:
    async def broken(self: Housekeeping) -> None:
        await self._clock.sleep(0.1)
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(Housekeeping, "run", broken)
    with pytest.raises(EngineLost, match="a part of the server has failed: 'a mistake of ours'"):
        serve(tmp_path / "adapters.yaml")


def test_an_engine_that_dies_ends_the_server(serve, engine, tmp_path) -> None:
    document = tmp_path / "adapters.yaml"
    document.write_text("adapters: []")
    engine.died.set()
    with pytest.raises(EngineLost, match="the engine has died"):
        serve(document)


def test_a_fixed_set_is_served(serve, write_lora) -> None:
    seen: list[int] = []
    thread = beside(lambda: seen.append(answer(f"{serve.url}/readyz").status_code))
    serve(Document(adapters=[Adapter(name="a", source=str(write_lora("one", 1.0)))]))
    thread.join()
    assert seen == [200]


def test_a_fixed_set_with_an_adapter_that_fails_ends_the_start(serve, write_lora) -> None:
    adapters = [Adapter(name=name, source=str(write_lora(name, value))) for name, value in (("a", 1.0), ("zero", 0.0))]
    with pytest.raises(ServeError, match="adapter 'zero': the adapter changes nothing"):
        serve(Document(adapters=adapters))


@pytest.mark.usefixtures("store")
def test_a_store_that_another_server_uses_is_one_line(serve, tmp_path) -> None:
    (tmp_path / "run-store").symlink_to(tmp_path / "store")
    with pytest.raises(InUse, match="is in use by another server: give each its own --store"):
        serve(tmp_path / "adapters.yaml")


def test_the_admin_port_is_bound_before_the_engine_starts(serve, tmp_path, monkeypatch) -> None:
    bound = []

    @asynccontextmanager
    async def started(*_: Any) -> AsyncIterator[Any]:
        with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", int(serve.admin.rpartition(":")[2])))
        bound.append(True)
        raise ServeError("far enough")
        yield

    monkeypatch.setattr(run.vllm, "started", started)
    with pytest.raises(ServeError, match="far enough"):
        serve(tmp_path / "adapters.yaml")
    assert bound
