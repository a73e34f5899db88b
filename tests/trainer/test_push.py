"""`push_to_hub` with the real client, against an HTTP stub of the hub on this machine."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest

from converter.adapter_dir import load_astra
from tests.trainer.test_train import astra_train, files


class StubHub(BaseHTTPRequestHandler):
    """Accepts every request and records the files of a commit."""

    repositories: ClassVar[list[str]] = []
    committed: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, object] = {}
        if self.path.endswith("/repos/create"):
            self.repositories.append(json.loads(body)["name"])
            answer = {"url": "https://huggingface.co/me/adapter"}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": "https://huggingface.co/me/adapter/commit/1",
                "commitOid": "1",
                "pullRequestUrl": None,
            }
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/adapter", "sha": "0", "siblings": []})

    def _answer(self, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[StubHub]]:
    monkeypatch.setattr(StubHub, "repositories", [])
    monkeypatch.setattr(StubHub, "committed", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_stub")
    yield StubHub
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_pushed_files_are_those_of_the_folder(tiny_base, jsonl, rows, tmp_path, hub) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "push_to_hub=me/adapter") == 0
    assert hub.repositories == ["adapter"]
    assert hub.committed == files(tmp_path / "out")


def test_a_failed_push_is_reported_and_the_adapter_is_complete(
    tiny_base, jsonl, rows, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "push_to_hub=me/adapter") == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "is complete, but me/adapter could not be pushed: " in last_line
    assert load_astra(tmp_path / "out").layers


def test_an_unknown_tracker_is_refused(tiny_base, jsonl, rows, tmp_path, capsys) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "report_to=[tensorbord]") == 2
    assert "report_to: 'tensorbord' is unknown or not installed" in capsys.readouterr().err.splitlines()[-1]
