"""Adapters with chat templates and defaults of their own, over HTTP."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import demo
from tests.support.server import Server

pytestmark = pytest.mark.timeout(300)

ONE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{{ mood }}{{ tools or '' }}"
TWO = "{% for m in messages %}{% for part in m.content %}({{ part.text }}){% endfor %}{% endfor %}"
HOSTILE = (
    "{% set asked = messages[0].content %}{% if 'slow' in asked %}{% for i in range(10**5) %}"
    "{% for j in range(10**5) %}{% endfor %}{% endfor %}{% elif 'large' in asked %}{{ 'a' * 10**9 }}"
    "{% elif 'deep' in asked %}"
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}{% elif 'refused' in asked %}{{ raise_exception('not so') }}"
    "{% endif %}({{ asked }})"
)
GREEDY = {"temperature": 0, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def publish(admin, loras, tmp_path_factory) -> Iterator[Callable[..., httpx.Response]]:
    """Publish copies of an adapter with other files beside it, and remove them in the end."""
    headers = {"Authorization": f"Bearer {admin.token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{admin.port}", headers=headers, timeout=60) as api:
        published: list[str] = []

        def publish(name: str, template: str | None = None, generation: Any = None, **files: Any) -> httpx.Response:
            folder = tmp_path_factory.mktemp(name) / "lora"
            shutil.copytree(loras["sql"], folder)
            if template is not None:
                (folder / "chat_template.jinja").write_text(template)
            for file, content in {"generation_config": generation, **files}.items():
                if content is not None:
                    (folder / f"{file}.json").write_text(json.dumps(content))
            answer = api.put(f"/adapters/{name}", json={"source": str(folder)})
            if answer.is_success:
                published.append(name)
            return answer

        yield publish
        for name in published:
            assert api.delete(f"/adapters/{name}").is_success


@pytest.fixture(scope="module")
def http(server: Server, publish) -> Iterator[httpx.Client]:
    for name, template, generation in (("one", ONE, GREEDY), ("two", TWO, None), ("hostile", HOSTILE, None)):
        assert publish(name, template, generation).is_success
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def chat(model: str, content: Any = "Hi", **settings: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **settings}


def prompt(http: httpx.Client, model: str, content: Any = "Hi", **settings: Any) -> str:
    """Return the text that a chat becomes."""
    tokens = http.post("/tokenize", json=chat(model, content, **settings)).json()["tokens"]
    text: str = http.post("/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"]
    return text


def test_each_adapter_is_asked_with_its_own_template_and_the_base_with_its(http) -> None:
    base = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    for model, expected in (("base", base), ("sql", base), ("one", "[user] Hi<|end|>"), ("two", "(Hi)")):
        assert prompt(http, model) == expected, model
    parts = [{"type": "text", "text": text} for text in ("a", "b")]
    assert (prompt(http, "one", parts), prompt(http, "two", parts)) == ("[user] a\nb<|end|>", "(a)(b)")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert prompt(http, "one", chat_template_kwargs={"mood": "glad"}) == "[user] Hi<|end|>glad"
    assert "'name': 'f'" in prompt(http, "one", tools=tools)
    assert prompt(http, "one", add_generation_prompt=False, continue_final_message=True) == "[user] Hi"


def test_all_routes_of_chats_ask_with_the_same_prompt(http) -> None:
    for model in ("one", "two", "base"):
        count = http.post("/tokenize", json=chat(model)).json()["count"]
        answers = [
            http.post("/v1/chat/completions", json=chat(model, max_tokens=1)).json()["usage"]["prompt_tokens"],
            http.post("/v1/responses", json={"model": model, "input": "Hi", "max_output_tokens": 1}).json()["usage"][
                "input_tokens"
            ],
            http.post("/v1/messages", json=chat(model, max_tokens=1)).json()["usage"]["input_tokens"],
            http.post("/v1/messages/count_tokens", json=chat(model)).json()["input_tokens"],
        ]
        assert answers == [count] * 4, model


def test_the_defaults_of_an_adapter_are_used_and_what_a_request_sets_wins(http) -> None:
    def asked(model: str, **settings: Any) -> tuple[str, int]:
        answer = http.post("/v1/chat/completions", json=chat(model, ignore_eos=True, **settings)).json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

    first = asked("one")
    assert first[1] == 3
    assert [asked("one", seed=seed) for seed in range(3)] == [first] * 3  # greedy
    assert len({asked("one", seed=seed, temperature=2.0) for seed in range(5)}) > 1
    assert asked("one", max_tokens=5)[1] == 5
    assert asked("two", max_tokens=5)[1] == 5
    answer = http.post("/v1/responses", json={"model": "one", "input": "Hi"}).json()
    assert (answer["temperature"], answer["usage"]["output_tokens"] <= 3) == (0, True)


def test_an_answer_ends_at_the_stop_tokens_of_its_adapter(http, publish) -> None:
    asked = {"prompt": "Table a (b, c)", "max_tokens": 12, "temperature": 0, "return_token_ids": True}

    def answer(model: str, **settings: Any) -> dict[str, Any]:
        found: dict[str, Any] = http.post("/v1/completions", json={"model": model, **asked, **settings}).json()
        return found["choices"][0]

    tokens = answer("sql", ignore_eos=True)["token_ids"]
    assert publish("stopped", generation={"eos_token_id": [tokens[4]]}).is_success
    at = tokens.index(tokens[4])
    found = answer("stopped")
    assert (found["token_ids"], found["finish_reason"]) == (tokens[: at + 1], "stop")
    assert answer("stopped", ignore_eos=True)["token_ids"] == tokens
    assert answer("sql")["token_ids"][: at + 2] == tokens[: at + 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("slow", "takes more than 1 s"),
        ("large", "needs more than 512 MiB of memory"),
        ("deep", "calls itself too deeply"),
        ("refused", "not so"),
    ],
)
def test_a_hostile_template_gets_400_while_other_requests_are_answered(http, server, content: str, reason: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        began = time.monotonic()
        hostile = [pool.submit(http.post, "/v1/chat/completions", json=chat("hostile", content)) for _ in range(2)]
        others = [pool.submit(prompt, http, model) for model in ("one", "two")]
        assert [other.result() for other in others] == ["[user] Hi<|end|>", "(Hi)"]
        for answer in (one.result() for one in hostile):
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "BadRequestError")
            assert error["message"].startswith("the chat template of hostile@")
            assert error["message"].endswith(f": {reason}")
        assert time.monotonic() - began < 20
    assert prompt(http, "hostile", "kind") == "(kind)"
    assert server.process.poll() is None


@pytest.mark.usefixtures("http")
def test_what_cannot_be_served_is_refused_in_a_line_and_a_template_of_the_base_is_noted(publish, server) -> None:
    for files, reason in (
        ({"template": "{{ messages"}, "its chat template cannot be used: line 1: unexpected end of template"),
        ({"generation": {"top_p": 7}}, "has top_p=7: input should be less than or equal to 1"),
        ({"added_tokens": {"<tool>": 10**6}}, "its tokenizer adds '<tool>' (1000000)"),
    ):
        answer = publish("refused", **files)
        assert answer.status_code == 422
        assert reason in answer.json()["error"]["message"]
    assert publish("same", (demo.BASE / "chat_template.jinja").read_text(), added_tokens={"<new>": 900}).is_success
    log = Path(server.log).read_text()
    assert "its chat template is the base's" in log
    assert "its tokenizer adds '<new>' (900), which the base's does not have: not used" in log
