"""The client for Python against a real admin port, with a stand-in for the engine behind it."""

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import Iterator
from dataclasses import asdict, fields

import httpx
import pytest

from astra_serve.adapters import events
from astra_serve.client import AsyncClient, Client, calls, state
from astra_serve.client.tar import Tar
from astra_serve.errors import (
    BadDocument,
    BadUpload,
    NoAnswer,
    NotPublished,
    Refused,
    ServeError,
    Superseded,
    UnknownAdapter,
)
from tests.astra_serve.client.conftest import Admin
from tests.astra_serve.world import TOKEN
from tests.support.server import free_port


@pytest.fixture
def client(admin: Admin) -> Iterator[Client]:
    with Client(admin.url, TOKEN, timeout_s=20) as found:
        yield found


def test_a_version_is_published_read_back_and_rolled_back(client: Client, write_lora) -> None:
    first = client.publish("a", write_lora("one", 1.0))
    second = client.publish("a", write_lora("two", 2.0), pin=True)
    assert first.version is not None
    assert first.version.probe is not None
    assert first.version.probe.effect > 0.01
    assert (second.state, second.pin, second.previous[0].digest) == ("serving", True, first.version.digest)
    now = client.get("a")
    assert (now.version and now.version.digest) == (second.version and second.version.digest)
    assert [adapter.name for adapter in client.list()] == ["a"]
    back = client.rollback("a")
    assert back.version is not None
    assert back.version.digest == first.version.digest
    assert client.unpin("a").pin is False
    client.remove("a")
    assert client.list().adapters == ()


def test_a_namespaces_adapter_is_another_one_than_the_namespace(client: Client, write_lora) -> None:
    one, two = write_lora("one", 1.0), write_lora("two", 2.0)
    client.publish("team", one)
    first = client.publish("team/sql", one).version
    client.publish("team/sql", two, upload=True)
    assert first is not None
    assert first.name.startswith("team/sql@")
    assert client.prepare("team/sql", two).name.startswith("team/sql@")
    assert client.wait("team/sql").name == "team/sql"
    back = client.rollback("team/sql").version
    assert back is not None
    assert (back.name, back.digest) == (first.name, first.digest)
    assert client.pin("team/sql").pin is True
    assert (client.get("team").pin, client.get("team").previous) == (False, ())
    assert {event.adapter for event in client.events() if event.adapter} == {"team", "team/sql"}
    client.remove("team/sql")
    assert [adapter.name for adapter in client.list()] == ["team"]


def test_a_canary_begins_and_ends(client: Client, write_lora) -> None:
    client.publish("a", write_lora("one", 1.0))
    begun = client.canary("a", write_lora("two", 2.0), 0.25)
    assert begun.canary is not None
    assert (begun.canary.weight, begun.canary.share) == (0.25, None)
    assert client.end_canary("a").canary is None


def test_the_types_have_all_that_the_server_answers(client: Client, admin: Admin, write_lora) -> None:
    client.publish("a", write_lora("one", 1.0))
    client.canary("a", write_lora("two", 2.0), 0.25)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for call in (calls.listing(), calls.get("a"), calls.events(), calls.rotation(), calls.refresh()):
        plain = httpx.request(call.method, admin.url + call.path, headers=headers).json()
        assert httpx.Response(200, json=asdict(client.ask(call))).json() == plain
    assert [one.name for one in fields(state.Event)] == [one.name for one in fields(events.Event)]


def test_each_refusal_is_an_error_of_its_class_with_the_servers_line(client: Client, admin: Admin, write_lora) -> None:
    with pytest.raises(UnknownAdapter, match=r"^there is no adapter 'none'$"):
        client.get("none")
    with pytest.raises(NotPublished, match=r"^'a' was not published: there is no folder /not/there on the server$"):
        client.publish("a", "/not/there")
    client.publish("a", write_lora("one", 1.0))
    with pytest.raises(Refused, match="'a' has no such previous version") as caught:
        client.rollback("a")
    assert caught.value.status == 409
    with Client(admin.url, "wrong") as other, pytest.raises(Refused, match="the admin token is missing or wrong"):
        other.list()


def test_a_publish_that_a_newer_one_supersedes_says_so(client: Client, admin: Admin, write_lora) -> None:
    one, two = write_lora("one", 1.0), write_lora("two", 2.0)
    admin.engine.gate.clear()
    caught: list[Exception] = []

    def publish() -> None:
        try:
            client.publish("a", one)
        except ServeError as error:
            caught.append(error)

    first = threading.Thread(target=publish)
    first.start()
    while not any(event.event == "loading" for event in client.events()):
        threading.Event().wait(0.01)
    second = threading.Thread(target=client.publish, args=("a", two))
    second.start()
    first.join(20)
    admin.release()
    second.join(20)
    assert isinstance(caught[0], Superseded)


def test_a_folder_that_the_server_does_not_see_is_uploaded(client: Client, admin: Admin, write_lora, tmp_path) -> None:
    served = client.publish("a", write_lora("one", 1.0), upload=True, pin=True)
    assert (served.state, served.pin) == ("serving", True)
    assert served.source.startswith(str(tmp_path / "shared"))

    async def use() -> state.AdapterState:
        async with AsyncClient(admin.url, TOKEN, timeout_s=20) as other:
            return await other.publish("b", write_lora("two", 2.0), upload=True)

    assert asyncio.run(use()).state == "serving"


def test_a_file_that_becomes_shorter_while_it_is_sent_leaves_nothing(client: Client, write_lora, tmp_path) -> None:
    call = calls.publish("a", write_lora("one", 1.0), upload=True)
    assert call.tar is not None
    name, file, size = call.tar.files[-1]
    longer = dataclasses.replace(call.tar, files=(*call.tar.files[:-1], (name, file, size + 5000)))
    with pytest.raises(BadUpload, match="became shorter while it was sent"):
        client.ask(dataclasses.replace(call, tar=longer))
    staging = tmp_path / "store" / "staging"
    while list(staging.iterdir()):
        threading.Event().wait(0.01)
    assert client.list().adapters == ()


def test_the_line_of_a_refused_upload_is_seen_while_it_is_sent(client: Client, tmp_path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**26)
    call = calls.publish("a", "/x")
    sending = dataclasses.replace(call, tar=Tar((("train.py", large, 2**26),)), query={"digets": "x"})
    with pytest.raises(BadDocument, match="digets: Extra inputs are not permitted"):
        client.ask(sending)
    with pytest.raises(BadUpload, match=r"'train\.py', which is no file of an adapter"):
        client.ask(dataclasses.replace(sending, query={}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: calls.publish("a/b/c", "x"), "'a/b/c': name: use up to 128 letters"),
        (lambda: calls.publish("a", "x", digest="abc"), "'a': digest: a digest is sha256:"),
        (lambda: calls.publish("a", ""), "'a': source: String should have at least 1 character"),
        (lambda: calls.canary("a", "x", 1.5), "canary.weight: Input should be less than 1"),
        (lambda: calls.get("../prepared/a"), "name: use up to 128 letters"),
        (lambda: calls.remove(".."), "name: use up to 128 letters"),
        (lambda: calls.publish("a", "/not/there", upload=True), "of this machine, and /not/there is none"),
        (lambda: calls.publish("a", "s3://bucket/a", upload=True), "and s3://bucket/a is none"),
    ],
)
def test_a_mistake_is_found_before_a_server_is_asked(make, message: str) -> None:
    with pytest.raises((BadDocument, BadUpload), match=message):
        make()


def test_a_server_that_does_not_answer_is_named(monkeypatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, TOKEN) as client, pytest.raises(NoAnswer, match=f"^{url} does not answer: "):
        client.list()
    for answer, message in ((httpx.Response(200, json={}), "as an admin port"), (httpx.Response(501), "with 501: is")):
        transport = httpx.MockTransport(lambda _, answer=answer: answer)
        with Client(url, TOKEN, transport=transport) as client, pytest.raises(NoAnswer, match=message):
            client.list()
    monkeypatch.delenv("ASTRA_ADMIN_TOKEN", raising=False)
    with pytest.raises(ServeError, match="put it into ASTRA_ADMIN_TOKEN"):
        Client(url)


def test_a_version_is_waited_for_until_it_serves_or_has_failed(client: Client, admin: Admin, write_lora) -> None:
    one = client.publish("a", write_lora("one", 1.0))
    assert one.version is not None
    assert client.wait("a", one.version.digest).state == "serving"
    with pytest.raises(NoAnswer, match=r"does not serve a as sha256:0+ within 0\.1 s"):
        client.wait("a", f"sha256:{64 * '0'}", timeout_s=0.1)
    with pytest.raises(UnknownAdapter):
        client.wait("b")
    text = admin.world.file.read_text()
    admin.world.file.write_text(text + "  - {name: b, source: /not/there}\n")  # by hand
    with pytest.raises(NotPublished, match="'b' is not served: there is no folder /not/there"):
        client.wait("b")
    admin.world.file.write_text("adapters: [{name: b}]")
    with pytest.raises(BadDocument, match=f"^{admin.url} does not follow the document as it is now: "):
        client.wait("b")


def test_the_async_client_makes_the_same_calls(admin: Admin, write_lora) -> None:
    async def use() -> list[str]:
        async with AsyncClient(admin.url, TOKEN, timeout_s=20) as client:
            served = await client.publish("a", write_lora("one", 1.0))
            assert served.name == (await client.get("a")).name == (await client.wait("a")).name
            with pytest.raises(UnknownAdapter):
                await client.rollback("b")
            seen = []
            async for event in client.follow():
                seen.append(event.event)
                if event.event == "serving":
                    return seen
        raise AssertionError

    assert asyncio.run(use()) == ["fetching", "verifying", "loading", "probing", "loaded", "serving"]
    both = (
        {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
        for kind in (Client, AsyncClient)
    )
    assert len(set(map(frozenset, both))) == 1


def test_a_method_shows_the_parameters_and_the_text_of_its_call() -> None:
    shown = inspect.signature(Client.publish)
    assert list(shown.parameters)[:3] == ["self", "name", "source"]
    assert shown.return_annotation is state.AdapterState
    assert (Client.publish.__doc__ or "").startswith("Serve the adapter at `source`")
