"""`astra-serve adapters` against a real admin port, with a stand-in for the engine behind it."""

import asyncio
import json
import re
import signal
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from astra_serve.cli import main
from astra_serve.document import desired
from tests.astra_serve.world import TOKEN
from tests.support.server import BIN, free_port


def adapters(port: int, *words: object) -> int:
    return main(["adapters", "--url", f"http://127.0.0.1:{port}", *map(str, words)])


def test_a_relative_path_is_that_of_the_caller(port: int, write_lora, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = write_lora("one", 1.0)
    monkeypatch.chdir(folder.parent)
    for words in (["publish", "a", "./one"], ["prepare", "a", "one"], ["canary", "a", "../loras/one", "0.5"]):
        words[2] = words[2].replace("loras", folder.parent.name)
        assert adapters(port, *words) == 0, capsys.readouterr().err
    entry = desired.parse((tmp_path / "adapters.yaml").read_text(), "").get("a")
    assert entry is not None
    assert entry.canary is not None
    assert (entry.source, entry.canary.version) == (str(folder), str(folder))
    assert adapters(port, "publish", "b", "./none") == 1
    assert f"there is no folder {folder.parent / 'none'} on the server" in capsys.readouterr().err


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
    capsys.readouterr()
    assert adapters(port, "list") == 0
    assert re.search(r"canary 20% .* no request yet .* memory|slot", capsys.readouterr().out)
    assert adapters(port, "canary", "a", "--end") == 0
    assert adapters(port, "events") == 0
    assert "probing" in capsys.readouterr().out
    assert adapters(port, "publish", "b", second["version"]["digest"]) == 0
    assert adapters(port, "unload", "b") == 0
    assert adapters(port, "drain") == 0
    assert "drained: not ready" in capsys.readouterr().out
    assert adapters(port, "drain", "--end") == 0
    assert adapters(port, "remove", "a") == 0


def test_a_name_with_a_namespace_is_one_name_in_every_command(port: int, write_lora, tmp_path: Path, capsys) -> None:
    (tmp_path / "adapters.yaml").write_text("adapters: []")
    one = write_lora("one", 1.0)
    assert adapters(port, "--json", "prepare", "team/sql", one) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert prepared["name"] == "team/sql"
    assert adapters(port, "--json", "rollout", "team/sql", one) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "team/sql"
    assert adapters(port, "publish", "team/sql", write_lora("two", 2.0)) == 0
    assert adapters(port, "rollback", "team/sql") == 0
    assert adapters(port, "status", f"team/sql={prepared['digest']}") == 0
    assert adapters(port, "list") == 0
    assert "team/sql" in capsys.readouterr().out
    assert adapters(port, "--json", "events") == 0
    assert '"adapter": "team/sql"' in capsys.readouterr().out
    assert adapters(port, "remove", "team/sql") == 0
    assert adapters(port, "get", "team/sql") == 1
    assert "there is no adapter 'team/sql'" in capsys.readouterr().err


def test_a_folder_is_uploaded(port: int, write_lora, tmp_path: Path, capsys) -> None:
    assert adapters(port, "--json", "publish", "a", write_lora("one", 1.0), "--upload", "--required") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["required"] is True
    assert found["source"].startswith(str(tmp_path / "shared"))
    (write_lora("two", 2.0) / "adapter_model.safetensors").unlink()
    assert adapters(port, "publish", "a", tmp_path / "two", "--upload") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "adapter_model.safetensors" in line


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


def test_the_exit_status_follows_the_outcome(port: int, write_lora, capsys, monkeypatch) -> None:
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


def test_a_server_that_does_not_answer_is_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", TOKEN)
    assert adapters(free_port(), "list") == 2
    assert "does not answer" in capsys.readouterr().err


def test_a_rollout_prints_its_steps_and_the_version(port: int, write_lora, capsys, tmp_path: Path) -> None:
    assert adapters(port, "prepare", "a", write_lora("one", 1.0)) == 0
    prepared = capsys.readouterr()
    assert prepared.err.split()[0] == "prepare"
    digest = prepared.out.strip()
    assert adapters(port, "status", f"a={digest}") == 1
    assert f"a is not {digest} yet" in capsys.readouterr().out
    two = write_lora("two", 1.0)
    assert adapters(port, "rollout", "a", two) == 1
    assert "give --document, or write 'adapters: []' into it" in capsys.readouterr().err
    (tmp_path / "adapters.yaml").write_text("adapters: []")
    assert adapters(port, "--json", "rollout", "a", two, "--pin") == 0
    rolled = capsys.readouterr()
    assert [line.split()[0] for line in rolled.err.splitlines()] == ["prepare", "verify", "flip", "serve"]
    assert json.loads(rolled.out)["digest"] == digest
    assert adapters(port, "status", "--wait", 5, f"a={digest}") == 0
    shown = capsys.readouterr().out
    assert digest[7:19] in shown
    assert "1 of 1 replicas serve what the document says" in shown


@pytest.mark.parametrize("read", [True, False], ids=["and says so", "also when nobody reads what it says"])
def test_ctrl_c_in_a_rollout_restores_the_document_also_when_repeated(
    port: int, write_lora, tmp_path: Path, engine, read: bool
) -> None:
    assert adapters(port, "publish", "a", write_lora("one", 1.0)) == 0
    before = desired.parse((tmp_path / "adapters.yaml").read_text(), "").get("a")
    engine.pause = lambda: asyncio.sleep(0.5)
    command = [str(BIN / "astra-serve"), "adapters", "rollout", "a", str(write_lora("two", 2.0))]
    with subprocess.Popen(
        [*command, "--url", f"http://127.0.0.1:{port}"], stderr=subprocess.PIPE, text=True
    ) as rolling:
        assert rolling.stderr
        while not rolling.stderr.readline().startswith("flip"):
            assert rolling.poll() is None
        if not read:
            rolling.stderr.close()  # as when `| tee` ends at the same Ctrl-C
        rolling.send_signal(signal.SIGINT)
        if read:
            assert rolling.stderr.readline().startswith("restore")
            rolling.send_signal(signal.SIGINT)
            assert "the document's entry is restored" in rolling.stderr.read()
        assert rolling.wait(20) == 130
    assert desired.parse((tmp_path / "adapters.yaml").read_text(), "").get("a") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollout", "a/b/c", "source"), "'a/b/c': name: use up to 128 letters"),
        (("rollout", "a", "source", "--digest", "abc"), "'a': digest: a digest is sha256:"),
        (("publish", "a b", "source"), "'a b': name: use up to 128 letters"),
        (("status", "a=sha256:12"), "is not NAME=sha256:..., with the digest that `prepare` prints"),
        (("status", "--url", "ftp://x"), "ftp://x is no URL of an admin port"),
        (("canary", "a"), "a canary needs SOURCE and WEIGHT; --end ends it"),
        (("canary", "a", "source"), "a canary needs SOURCE and WEIGHT; --end ends it"),
        (("canary", "a", "source", "0.1", "--end"), "a canary needs SOURCE and WEIGHT; --end ends it"),
        (("canary", "a", "", "0.1"), "canary.version: String should have at least 1 character"),
        (("canary", "a", "source", "1.5"), "canary.weight: Input should be less than 1"),
        (("list", "--url", "http://h:1"), "list asks one server: give one --url"),
        (("drain", "--url", "http://a:hunter2@h:1"), "the token comes from the environment"),
    ],
)
def test_a_mistake_is_one_line_and_no_server_is_asked(port: int, words: tuple[str, ...], message: str, capsys) -> None:
    assert adapters(port, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "hunter2" not in line


def test_urls_before_and_after_the_command_are_all_asked(port: int, capsys) -> None:
    assert adapters(port, "status", "--url", "http://127.0.0.1:9", "--timeout", 5) == 1
    shown = capsys.readouterr().out
    assert f"127.0.0.1:{port}" in shown
    assert "http://127.0.0.1:9 does not answer" in shown


def test_the_public_port_is_distinguished_from_the_admin_port(capsys, monkeypatch) -> None:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", TOKEN)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            assert adapters(other.server_port, "rollout", "a", "b") == 1
        finally:
            other.shutdown()
            thread.join()
    assert "is it the admin port, of this version of astra-serve?" in capsys.readouterr().err
