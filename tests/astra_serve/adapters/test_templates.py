"""Chat templates in worker processes: rendered as transformers does, and what they do harms nothing else."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from astra_serve.adapters.templates import RenderLimits, Templates, content_format
from astra_serve.errors import TemplateFailed, Unavailable
from tests.astra_serve.world import in_a_loop

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße, 世界 🌍\n"},
    {
        "role": "assistant",
        "content": "  Hello there ",
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1}}}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "z": [1, 2.5, None, True]}}}]
CHATML = (
    "{%- for m in messages %}\n{%- if loop.first and tools %}{{ tools | tojson(indent=1) }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + eos_token + '\\n' }}\n    {%- endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{{ m | pprint }}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ documents }}{{ messages | tojson }}{{ mood | default('plain') }}",
    "{% macro say(m) %}\n  {{ m.content }}\n{% endmacro %}\n{% for m in messages | rejectattr('role', 'eq', 'x') %}\n"
    "{{ say(m) }}\n{% endfor %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ 'a b'.split(' ') | join('|') }}",
]
SLOW = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
PLAIN = "{{ messages[0].content }}"


def variables(**given: Any) -> dict[str, Any]:
    return {"bos_token": "<s>", "eos_token": "</s>", "documents": None, "add_generation_prompt": False, **given}


async def asked(templates: Templates, text: str, version: str = "v", **settings: Any) -> str:
    return await templates.render(version, text, MESSAGES, variables=settings.pop("variables", variables()), **settings)


@in_a_loop
async def test_a_template_renders_what_transformers_renders() -> None:
    async with Templates() as templates:
        for text in TEMPLATES:
            for given in (variables(add_generation_prompt=True), variables(tools=TOOLS, mood="glad")):
                tools = given.pop("tools", None)
                (expected,), _ = render_jinja_template([MESSAGES], chat_template=text, tools=tools, **given)
                assert await asked(templates, text, variables={**given, "tools": tools}) == expected


@pytest.mark.parametrize("content", ["the text", "text with spaces  ", [{"type": "text", "text": "a part "}]])
@in_a_loop
async def test_the_last_message_is_continued_as_transformers_does(content: Any) -> None:
    text = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}<e>{% endfor %}"
    messages = [{"role": "user", "content": "0"}, {"role": "assistant", "content": content}]
    (expected,), _ = render_jinja_template([messages], chat_template=text, continue_final_message=True)
    async with Templates() as templates:
        assert await templates.render("v", text, messages, go_on=True, variables={}) == expected
        with pytest.raises(TemplateFailed, match="no 'content' to continue"):
            await templates.render("v", "x", messages, go_on=True, variables={})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SLOW, "takes more than 1 s"),
        ("{{ 'a' * 10**9 }}", "needs more than 512 MiB of memory"),
        ("{{ '%999999999d' | format(1) }}", "needs more than 512 MiB of memory"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself too deeply"),
        ("{{ 'a' * 1001 }}", "a prompt of 1001 characters, and one of this model has at most 1000"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no\nsystem message') }}", "^no system message$"),
        ("{{ messages[0].a.b }}", "has no attribute 'a'"),
        ("{{ messages", "line 1: unexpected end of template"),
    ],
    ids=lambda value: value[:20],
)
@in_a_loop
async def test_a_template_that_harms_fails_its_own_request_and_the_next_one_is_answered(text: str, reason: str) -> None:
    async with Templates() as templates:
        with pytest.raises(TemplateFailed, match=reason):
            await asked(templates, text, most=1000)
        assert await asked(templates, PLAIN) == MESSAGES[0]["content"]


@in_a_loop
async def test_a_slow_version_uses_its_share_of_the_workers_and_they_are_killed() -> None:
    async with Templates(RenderLimits(workers=2, share=1)) as templates:
        slow = [asyncio.create_task(asked(templates, SLOW, "slow")) for _ in range(2)]
        await asyncio.sleep(0)
        for _ in range(5):
            await asked(templates, PLAIN, "other")
        assert not slow[1].done()  # waits for the first one
        assert all(isinstance(found, TemplateFailed) for found in await asyncio.gather(*slow, return_exceptions=True))
        assert workers() == []  # the second one had the worker of the other version


@in_a_loop
async def test_a_request_waits_for_a_worker_for_a_limited_time() -> None:
    async with Templates(RenderLimits(seconds=0.5, workers=1, share=1, wait_s=0.01)) as templates:
        slow = asyncio.create_task(asked(templates, SLOW))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="all processes for chat templates are busy"):
            await asked(templates, PLAIN)
        with pytest.raises(TemplateFailed):
            await slow


@in_a_loop
async def test_a_request_that_is_cancelled_leaves_no_worker_that_is_in_the_middle_of_it() -> None:
    async with Templates() as templates:
        await asked(templates, PLAIN)
        cancelled = asyncio.create_task(asked(templates, SLOW))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert workers() == []
        assert await asked(templates, PLAIN) == MESSAGES[0]["content"]
    assert workers() == []


@in_a_loop
async def test_a_worker_has_no_secret_and_can_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "secret-of-the-server")
    async with Templates() as templates:
        await asked(templates, PLAIN)
        (worker,) = workers()
        assert "secret-of-the-server" not in worker.environ().values()
        limits = {resource: worker.rlimit(resource)[1] for resource in (psutil.RLIMIT_NOFILE, psutil.RLIMIT_FSIZE)}
        assert limits == {psutil.RLIMIT_NOFILE: 3, psutil.RLIMIT_FSIZE: 0}
        assert worker.rlimit(psutil.RLIMIT_AS)[1] == 512 * 2**20


def test_a_worker_ends_at_once_with_a_server_that_is_killed_while_it_renders(tmp_path: Path) -> None:
    script = f"""
import asyncio
from pathlib import Path
from astra_serve.adapters.templates import RenderLimits, Templates

async def main():
    templates = Templates(RenderLimits(seconds=60))
    await templates.render("v", "x", [{{}}], variables={{}})
    (worker,) = templates._idle
    rendering = asyncio.create_task(templates.render("v", {SLOW!r}, [{{}}], variables={{}}))
    await asyncio.sleep(0.2)
    Path({str(tmp_path)!r}, "up").write_text(str(worker.pid))
    await rendering

asyncio.run(main())
"""
    server = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: (tmp_path / "up").exists() and (tmp_path / "up").read_text() != "")
    worker = psutil.Process(int((tmp_path / "up").read_text()))
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 1.5)  # it has 2 s of a processor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CHATML, "string"),
        ("{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}", "openai"),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
            "{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
            "openai",
        ),
        ("{{ messages | tojson }}", "string"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('') }}{% endif %}{{ messages[1].content[0].text }}"
         "{{ messages[1].content[1].text }}", "openai"),
    ],
)  # fmt: skip
def test_the_format_of_contents_is_found(text: str, expected: str) -> None:
    assert content_format(text) == expected


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "astra_serve.adapters.template_worker" in child.cmdline()]


def until(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
