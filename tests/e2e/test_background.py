"""Background responses of the real engine, by the official client."""

import time

import httpx
import openai
import pytest
from openai.types.responses import Response

from tests.support.server import Server
from trainer.embedded import tasks

pytestmark = pytest.mark.timeout(500)
LONG = {"ignore_eos": True}


def question() -> str:
    return str(tasks.rows("intent", test=True, n=1)[0]["messages"][0]["content"])


def ended(client: openai.OpenAI, response: Response) -> Response:
    while response.status in ("queued", "in_progress"):
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    return response


def cancelled(server: Server) -> int:
    """Return the number of such requests in the log."""
    lines = server.log.read_text(errors="replace").splitlines()
    return sum('"/v1/responses"' in line and '"outcome": "cancelled"' in line for line in lines)


def running(server: Server) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("astra_requests_running{"))


def test_a_background_response_is_as_whole_as_one_in_the_foreground(client: openai.OpenAI) -> None:
    asked = {"model": "intent", "input": question(), "temperature": 0, "max_output_tokens": 64}
    whole = client.responses.create(**asked)
    assert whole.output_text
    queued = client.responses.create(**asked, background=True)
    assert queued.status == "queued"
    late = ended(client, queued)
    assert (late.status, late.output_text) == (whole.status, whole.output_text)
    assert late.usage is not None
    assert late.usage.output_tokens == whole.usage.output_tokens
    assert late.model.startswith("intent@")


def test_a_stream_in_the_background_can_be_left_and_read_again(client: openai.OpenAI) -> None:
    asked = {"model": "intent", "input": question(), "temperature": 0, "max_output_tokens": 64}
    whole = client.responses.create(**asked).output_text
    with client.responses.create(**asked, background=True, stream=True) as stream:
        response = next(iter(stream)).response
    events = list(client.responses.retrieve(response.id, stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_background_response_ends_its_work_and_its_streams(
    client: openai.OpenAI, server: Server, stream: bool
) -> None:
    asked = {"model": "intent", "input": question(), "max_output_tokens": 400, "extra_body": LONG, "background": True}
    if stream:
        events = iter(client.responses.create(**asked, stream=True))
        response = next(events).response
    else:
        response = client.responses.create(**asked)
    assert running(server) == 1
    before = cancelled(server)
    assert client.responses.cancel(response.id).status == "cancelled"
    if stream:
        *_, last = events
        assert (last.type, last.response.status) == ("response.completed", "cancelled")
    while running(server) or cancelled(server) == before:
        time.sleep(0.02)
    assert client.responses.retrieve(response.id).status == "cancelled"
