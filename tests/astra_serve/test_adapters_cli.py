"""`astra-serve adapters` against a real admin port, with a stand-in for the engine behind it."""

import asyncio
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from astra_serve import admin
from astra_serve.cli import main
from astra_serve.control import Control
from astra_serve.fleet import Fleet
from astra_serve.gateway import Gateway
from astra_serve.reconcile import Reconciler
from benchmarks.server import BIN, free_port

TOKEN = "secret"  # noqa: S105


@pytest.fixture
def port(engine, store, base, tmp_path: Path, monkeypatch) -> Iterator[int]:
    """A running admin API in a thread of its own."""
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", TOKEN)
    number, started, servers = free_port(), threading.Event(), []

    async def serve() -> None:
        fleet = Fleet(engine, store, base, 2)
        control = Control(str(tmp_path / "adapters.yaml"), fleet, Reconciler(fleet, store))
        app = admin.build(control, Gateway(fleet), TOKEN)
        servers.append(uvicorn.Server(uvicorn.Config(app, port=number, log_level="warning")))
        started.set()
        await servers[0].serve()
        await control.reconciler.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(10)
    while not servers[0].started:
        threading.Event().wait(0.01)
    yield number
    servers[0].should_exit = True
    thread.join(10)


def adapters(port: int, *words: object) -> int:
    return main(["adapters", "--url", f"http://127.0.0.1:{port}", *map(str, words)])


def test_publish_list_roll_back_and_remove(port: int, write_lora, capsys) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        assert adapters(port, "publish", "a", write_lora(name, value)) == 0
    capsys.readouterr()
    assert adapters(port, "list") == 0
    shown = capsys.readouterr().out
    assert "serving" in shown
    assert "slot" in shown
    assert adapters(port, "--json", "get", "a") == 0
    second = json.loads(capsys.readouterr().out)
    assert adapters(port, "rollback", "a") == 0
    assert adapters(port, "pin", "a") == 0
    capsys.readouterr()
    assert adapters(port, "--json", "get", "a") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"]["digest"] == second["previous"][0]["digest"]
    assert found["pin"] is True
    assert adapters(port, "canary", "a", second["version"]["digest"], 0.2) == 0
    assert adapters(port, "canary", "a", "--end") == 0
    assert adapters(port, "events") == 0
    assert "probing" in capsys.readouterr().out
    assert adapters(port, "alias", "b", second["version"]["name"]) == 0
    assert adapters(port, "unload", "b") == 0
    assert adapters(port, "drain") == 0
    assert "/readyz says no" in capsys.readouterr().out
    assert adapters(port, "drain", "--end") == 0
    assert adapters(port, "remove", "a") == 0


def test_events_are_followed_as_they_happen(port: int, write_lora) -> None:
    command = [str(BIN / "astra-serve"), "adapters", "--url", f"http://127.0.0.1:{port}", "--json"]
    with subprocess.Popen([*command, "events", "--follow"], stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        assert adapters(port, "publish", "a", write_lora("one", 1.0)) == 0
        seen = []
        while "serving" not in seen:
            seen.append(json.loads(following.stdout.readline())["event"])
        assert seen == ["fetching", "verifying", "loading", "probing", "loaded", "serving"]
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == 0


def test_the_documents_schema_is_printed_without_a_server(capsys, monkeypatch) -> None:
    monkeypatch.delenv("ASTRA_ADMIN_TOKEN", raising=False)
    assert main(["adapters", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["Adapter"]["required"]) == {"name", "source"}


def test_the_exit_status_tells_the_outcome(port: int, write_lora, capsys, monkeypatch) -> None:
    for words, status, message in [
        (("publish", "a", "/not/there"), 1, "was not published: there is no folder /not/there"),
        (("publish", "a", write_lora("zero", 0.0)), 1, "changes nothing"),
        (("get", "none"), 1, "there is no adapter 'none'"),
        (("rollback", "none"), 1, "there is no adapter 'none'"),
    ]:
        assert adapters(port, *words) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "wrong")
    assert adapters(port, "list") == 1
    assert "the admin token is missing or wrong" in capsys.readouterr().err
    monkeypatch.delenv("ASTRA_ADMIN_TOKEN")
    assert adapters(port, "list") == 2
    assert "put it into ASTRA_ADMIN_TOKEN" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_said_so(capsys, monkeypatch) -> None:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", TOKEN)
    assert adapters(free_port(), "list") == 2
    assert "does not answer" in capsys.readouterr().err
