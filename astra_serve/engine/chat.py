"""Prompts and defaults of sampling by the adapter of the running request, in place of those of the base.

vLLM parses the messages of every route, renders them, and tokenises the text. For an adapter with a chat template of
its own a worker process renders (`adapters.templates`): vLLM itself never reads that template. It gets a stand-in of
the same format of contents, by which it parses the messages.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.renderers.hf import (
    HfRenderer,
    _consolidate_system_messages,
    _convert_developer_to_system,
    _detect_developer_role_support,
)
from vllm.renderers.params import ChatParams

from astra_serve.adapters.templates import Templates
from astra_serve.errors import TemplateFailed, Unavailable
from astra_serve.gateway import request as requests

STAND_INS = {
    "string": "{{ messages }}",
    "openai": "{% for message in messages %}{% for part in message.content %}{% endfor %}{% endfor %}",
}
# Parameters of transformers' `apply_chat_template` that are no variables of a template.
NO_VARIABLES = frozenset(
    {"conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "continue_final_message"}
)


class OwnTemplates:
    """Stands before two methods of vLLM's renderer, for requests to adapters with a chat template of their own."""

    def __init__(self, renderer: HfRenderer, of_base: str | None, templates: Templates, most: int) -> None:
        """`of_base` is the template of --chat-template: a request that brings another one is rendered with that.

        A prompt has up to `most` characters.
        """
        self._of_base, self._templates, self._most = of_base, templates, most
        self._render_messages: Callable[..., Awaitable[Any]] = renderer.render_messages_async
        self._apply: Callable[..., Awaitable[Any]] = renderer._apply_chat_template_async

    async def render_messages(self, messages: list[Any], params: ChatParams) -> Any:
        """Return the conversation and its prompt, as HfRenderer.render_messages_async does."""
        request = requests.current.get()
        own = request.defaults.template if request else None
        if own is not None and params.chat_template == self._of_base:
            _, content_format = own.chosen(with_tools=params.chat_template_kwargs.get("tools") is not None)
            params = replace(params, chat_template=STAND_INS[content_format])
        return await self._render_messages(messages, params)

    async def apply(
        self,
        model_config: Any,
        tokenizer: Any,
        conversation: list[Any],
        *,
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        tokenize: bool = True,
        **settings: Any,
    ) -> Any:
        """Return the text of a conversation, or its tokens, as vLLM's safe_apply_chat_template does.

        Raises VLLMValidationError, which is 400, where the template fails, and GracefulHTTPError, 503, where all
        workers are busy.
        """
        request = requests.current.get()
        own = request.defaults.template if request else None
        if request is None or own is None or chat_template not in STAND_INS.values():
            given = {"tools": tools, "chat_template": chat_template, "tokenize": tokenize, **settings}
            return await self._apply(model_config, tokenizer, conversation, **given)
        version = request.version.name if request.version else request.model
        text, _ = own.chosen(with_tools=tools is not None)
        if any(m["role"] == "developer" for m in conversation) and not _detect_developer_role_support(text):
            conversation = _consolidate_system_messages(_convert_developer_to_system(conversation))
        go_on = settings.get("continue_final_message", False)
        if go_on and settings.get("add_generation_prompt"):
            raise VLLMValidationError("continue_final_message and add_generation_prompt exclude each other")
        variables = {
            **tokenizer.special_tokens_map,
            **own.template.special_tokens,
            "documents": None,
            "add_generation_prompt": False,
            **{name: value for name, value in settings.items() if name not in NO_VARIABLES},
            "tools": tools,
        }
        try:
            prompt = await self._templates.render(
                version, text, conversation, go_on=go_on, variables=variables, most=self._most
            )
        except TemplateFailed as error:
            raise VLLMValidationError(f"the chat template of {version}: {error}") from error
        except Unavailable as error:
            raise GracefulHTTPError(f"{error}: ask again", HTTPStatus.SERVICE_UNAVAILABLE) from error
        if tokenize:
            return await asyncio.to_thread(tokenizer.encode, prompt, add_special_tokens=False)
        return prompt


class Sampling(Mapping[str, Any]):
    """vLLM's default parameters of sampling: those of the running request's adapter before those of the base."""

    def __init__(self, of_base: Mapping[str, Any]) -> None:
        self._of_base = of_base

    def __getitem__(self, name: str) -> Any:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> Mapping[str, Any]:
        request = requests.current.get()
        return {**self._of_base, **request.defaults.sampling} if request else self._of_base


def with_stop_tokens(params: SamplingParams, stop_tokens: Collection[int], eos: int | None) -> SamplingParams:
    """Return parameters that end an answer also at the stop tokens of an adapter.

    vLLM does the same with those of the base's generation config; `eos` is the base's end-of-sequence token.
    """
    params = params.clone()
    params.update_from_generation_config({"eos_token_id": list(stop_tokens)}, eos)
    return params
