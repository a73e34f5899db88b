"""What requests and sources say in the log, in both formats."""

import io
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from pythonjsonlogger.json import JsonFormatter
from vllm.logging_utils import NewLineFormatter

from astra_serve.adapters.events import Event
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.caller import Caller
from astra_serve.observe import log

FORGED = "/v1/x\nINFO the server is fine\r\x1b[2J\x9b\u2028\u202e\ud800"
SHOWN = r"/v1/x\nINFO the server is fine\r\x1b[2J\x9b\u2028\u202e\ud800"
FORMATTERS = {"text": NewLineFormatter("%(levelname)s %(message)s"), "json": JsonFormatter("%(levelname)s %(message)s")}


@pytest.fixture(params=FORMATTERS)
def written(request, monkeypatch, caplog) -> Callable[[], str]:
    """Let the log write to a string, in one of its formats, and return that."""
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMATTERS[request.param])
    parent = logging.getLogger("vllm")
    monkeypatch.setattr(parent, "handlers", [handler])
    monkeypatch.setattr(parent, "propagate", False)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])
    caplog.set_level(logging.INFO, "vllm")
    log.protect()
    return lambda: stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def values(text: str) -> list[Any]:
    """Return the values in a line of JSON, or the line."""
    return list(json.loads(text).values()) if text.startswith("{") else [text]


def check(text: str) -> None:
    line, nothing = text.split("\n")
    assert not nothing
    found = [value for value in values(line) if isinstance(value, str)]
    assert any(SHOWN in value for value in found)
    assert all(value.isprintable() for value in found)


def test_a_request_is_one_line_whatever_its_path_and_model_are(written) -> None:
    log.request(Request("1", FORGED, FORGED, None))  # type: ignore[arg-type]
    check(written())


def test_the_line_of_a_request_names_its_tenant_and_its_tokens(caplog) -> None:
    caplog.set_level(logging.INFO, log.logger.name)
    caplog.handler.setLevel(logging.INFO)
    log.logger.addHandler(caplog.handler)
    try:
        log.request(Request("1", "/v1", "a", None, caller=Caller("team"), prompt_tokens=5, cached_tokens=2))  # type: ignore[arg-type]
    finally:
        log.logger.removeHandler(caplog.handler)
    record = vars(caplog.records[0])
    assert (record["tenant"], record["prompt_tokens"], record["cached_tokens"]) == ("team", 5, 2)


def test_an_event_without_an_adapter_names_its_subject(written) -> None:
    log.event(Event("", "usage_failed", reason="the disk is full"))
    assert any("usage: usage_failed: the disk is full" in str(value) for value in values(written()))


def test_an_event_is_one_line_whatever_its_source_is(written) -> None:
    log.event(Event("a", "failed", reason=f"there is no folder {FORGED}"))
    check(written())


@pytest.mark.parametrize("name", ["vllm.astra_serve", "vllm.entrypoints"])
def test_a_message_about_a_text_of_a_client_is_one_line(written, name: str) -> None:
    logging.getLogger(name).error("Task for %s was cancelled after %d s", FORGED, 3)
    check(written())
    assert "after 3 s" in written()


def test_a_traceback_has_its_lines_and_controls_no_terminal(written) -> None:
    try:
        raise ValueError("red \x1b[31m")
    except ValueError:
        log.logger.exception("broken")
    assert r"red \x1b[31m" in "".join(values(written()))
    assert "Traceback" in written()
