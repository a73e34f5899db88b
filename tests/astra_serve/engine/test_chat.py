"""The adapter of the running request decides on sampling, stop tokens and the chat template."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.renderers.hf import _detect_content_format
from vllm.renderers.params import ChatParams

from astra_serve.adapters.defaults import Defaults, OwnTemplate
from astra_serve.adapters.template_worker import content_format
from astra_serve.adapters.templates import Templates
from astra_serve.adapters.version import Version
from astra_serve.engine.chat import STAND_INS, OwnTemplates, Sampling, with_stop_tokens
from astra_serve.errors import TemplateFailed, Unavailable
from astra_serve.gateway import request as requests
from astra_serve.gateway.request import Request
from converter.adapter_dir import ChatTemplate
from tests.astra_serve.world import in_a_loop

CALL = {"name": "f", "arguments": {"x": "é"}}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
MESSAGES = [{"role": "user", "content": "Hi"}]
TEXT = "{{ messages[0].role }} {{ eos_token }}{{ pad_token }}{{ mood }}{{ add_generation_prompt }}{{ tools }}"
PADDED = SimpleNamespace(special_tokens_map={"eos_token": "<base>", "pad_token": "<pad>"})


@contextmanager
def running(defaults: Defaults) -> Iterator[Request]:
    task: Any = asyncio.current_task()
    request = Request("1", "/v1", "a", task, version=Version("a", "sha256:" + 64 * "a"), defaults=defaults)
    token = requests.current.set(request)
    try:
        yield request
    finally:
        requests.current.reset(token)


def own(text: str) -> Defaults:
    template = ChatTemplate({"default": text, "tool_use": "tools"}, {"eos_token": "<own>"})
    return Defaults(OwnTemplate(template, {"default": "string", "tool_use": "openai"}))


class Renderer:
    """vLLM's renderer, which keeps what it is asked."""

    def __init__(self) -> None:
        self.params: list[ChatParams] = []
        self.applied: list[Any] = []

    async def render_messages_async(self, _: Any, params: ChatParams) -> None:
        self.params.append(params)

    async def _apply_chat_template_async(self, *_: Any, **settings: Any) -> str:
        self.applied.append(settings)
        return "the base's"


def test_the_stand_ins_have_their_format_for_vllm() -> None:
    found = {name: _detect_content_format(text, default="unknown") for name, text in STAND_INS.items()}  # type: ignore[arg-type]
    assert found == {name: name for name in STAND_INS}


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": "42"},
]


@in_a_loop
async def test_templates_of_many_models_are_rendered_as_transformers_does_and_have_the_format_that_vllm_finds() -> None:
    trl = find_spec("trl")  # an import of it would silence the servers that this process starts
    assert trl is not None
    found = sorted((Path(str(trl.origin)).parent / "chat_templates").glob("*.jinja"))[::4]
    assert len(found) > 10
    async with Templates() as templates:
        for text in {file.read_text(encoding="utf-8") for file in found}:
            assert content_format(text) == _detect_content_format(text, default="string")
            for messages, tools in ((MESSAGES, None), (TALK, [{"type": "function", "function": FUNCTION}])):
                given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "documents": None}
                try:
                    (expected,), _ = render_jinja_template([messages], chat_template=text, tools=tools, **given)
                except Exception as error:  # the template refuses tools
                    expected = " ".join(str(error).split())
                try:
                    rendered = await templates.render("v", text, messages, variables={**given, "tools": tools})
                except TemplateFailed as error:
                    rendered = str(error)
                assert rendered == expected


@in_a_loop
async def test_defaults_are_the_running_adapters_before_the_bases_and_the_requests_own_before_them() -> None:
    sampling = Sampling({"top_k": 7, "top_p": 0.5})
    asked = {"model": "a", "messages": MESSAGES}
    with running(Defaults(None, {"top_k": 3, "temperature": 0.25})):
        chat = ChatCompletionRequest(**asked).to_sampling_params(9, sampling)  # type: ignore[arg-type]
        assert (chat.top_k, chat.top_p, chat.temperature) == (3, 0.5, 0.25)
        chat = ChatCompletionRequest(**asked, top_k=1).to_sampling_params(9, sampling)  # type: ignore[arg-type]
        assert (chat.top_k, chat.temperature) == (1, 0.25)
        response = ResponsesRequest(model="a", input="x").to_sampling_params(9, sampling)  # type: ignore[arg-type]
        assert (response.top_k, response.top_p, response.temperature) == (3, 0.5, 0.25)
    assert dict(sampling) == {"top_k": 7, "top_p": 0.5}  # a request for the base
    assert not Sampling({})


def test_an_answer_ends_at_the_adapters_stop_tokens_too_unless_the_request_ignores_ends() -> None:
    given = SamplingParams(stop_token_ids=[4])
    assert set(with_stop_tokens(given, (2, 3), 2).stop_token_ids or ()) == {3, 4}  # 2 is the base's end
    assert given.stop_token_ids == [4]
    assert with_stop_tokens(SamplingParams(ignore_eos=True), (3,), 2).stop_token_ids == []


@in_a_loop
async def test_a_request_is_rendered_with_its_adapters_template_and_others_by_vllm() -> None:
    renderer: Any = Renderer()
    async with Templates() as templates:
        chat = OwnTemplates(renderer, None, templates, 1000)

        async def text(tokenizer: Any = PADDED, **settings: Any) -> Any:
            stand_in = STAND_INS["string"]
            return await chat.apply(
                None, tokenizer, MESSAGES, chat_template=stand_in, **{"tokenize": False, **settings}
            )

        with running(own(TEXT)):
            await chat.render_messages(MESSAGES, ChatParams())
            await chat.render_messages(MESSAGES, ChatParams(chat_template_kwargs={"tools": []}))
            await chat.render_messages(MESSAGES, ChatParams(chat_template="of the request, which the operator trusts"))
            assert await text(return_dict=False, mood="!") == "user <own><pad>!FalseNone"
            assert await text(add_generation_prompt=True, pad_token="<asked>") == "user <own><asked>TrueNone"  # noqa: S106
            assert await text(tools=[{"a": 1}]) == "tools"
            encoding = SimpleNamespace(encode=lambda t, add_special_tokens: [len(t), add_special_tokens])
            encoding.special_tokens_map = {}
            assert await text(encoding, tools=[], tokenize=True) == [5, False]
            assert await chat.apply(None, None, MESSAGES, chat_template="of the request") == "the base's"
        with running(Defaults()):
            await chat.render_messages(MESSAGES, ChatParams())
            assert await chat.apply(None, None, MESSAGES, tools=[1], tokenize=False, mood="!") == "the base's"
    templates_of = [params.chat_template for params in renderer.params]
    assert templates_of == [STAND_INS["string"], STAND_INS["openai"], "of the request, which the operator trusts", None]
    assert renderer.applied[1] == {"tools": [1], "chat_template": None, "tokenize": False, "mood": "!"}


@in_a_loop
async def test_a_template_that_fails_is_400_and_names_the_adapter_and_busy_workers_are_503() -> None:
    async with Templates() as templates:
        chat = OwnTemplates(Renderer(), None, templates, 3)  # type: ignore[arg-type]
        for text, reason in (
            ("{{ raise_exception('no') }}", "no$"),
            ("{{ 'a' * 4 }}", "makes a prompt of 4 characters"),
        ):
            with running(own(text)), pytest.raises(VLLMValidationError, match=f"template of a@aaaaaaaaaaaa: {reason}"):
                await chat.apply(None, PADDED, MESSAGES, chat_template=STAND_INS["string"])
        both = {"continue_final_message": True, "add_generation_prompt": True, "chat_template": STAND_INS["string"]}
        with running(own("x")), pytest.raises(VLLMValidationError, match="exclude each other"):
            await chat.apply(None, PADDED, MESSAGES, **both)

    class Busy:
        async def render(self, *_: Any, **__: Any) -> str:
            raise Unavailable("all processes for chat templates are busy")

    chat = OwnTemplates(Renderer(), None, Busy(), 3)  # type: ignore[arg-type]
    with running(own("x")), pytest.raises(GracefulHTTPError) as raised:
        await chat.apply(None, PADDED, MESSAGES, chat_template=STAND_INS["string"])
    assert raised.value.http_status == 503
