"""A base's chat template, and the form of messages that it renders completely.

Templates differ in what they can take: functions (`tools`), calls whose arguments are objects or JSON text, content in
several parts. What a template would leave out without a word is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from converter.errors import first_line
from trainer.data.conversation import Message, called_functions, for_template

_PROBE = "probe5d2f0c1e"  # replaces text, to find out whether a template renders it


@dataclass(frozen=True)
class Template:
    """The chat template of `tokenizer`, with the functions and the template's settings of one row."""

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    as_server: bool = True  # see `for_template`
    as_parts: bool = False

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """Return the conversation as text; with `ask`, with the generation prompt after it. Raises ValueError."""
        given = [for_template(m, as_server=self.as_server, as_parts=self.as_parts) for m in messages]
        fixed = {"tools": self.tools or None, "tokenize": False, "add_generation_prompt": ask}
        try:
            text: str = self.tokenizer.apply_chat_template(given, **{**self.settings, **fixed})
        except (TemplateError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"this base's chat template refuses the conversation: {first_line(error)}") from error
        return text


def complete_template(template: Template, messages: Sequence[Message]) -> Template:
    """Return the template in the form that renders all parts, calls, results and functions of a conversation.

    Raises ValueError if it leaves functions, calls or results out in every form, or refuses the conversation.
    """
    several = any(isinstance(m["content"], list) and len(m["content"]) > 1 for m in messages)
    if several or not _renders(template, [_PROBE], as_parts=False):
        template = replace(template, as_parts=_renders(template, [f"{_PROBE}1", f"{_PROBE}2"], as_parts=True))
    if any("tool_calls" in m or m["role"] == "tool" for m in messages):
        template = _with_calls(template, messages)
    if template.tools and template.render(messages) == _rendered(replace(template, tools=[]), messages):
        raise ValueError('this base\'s chat template does not render "tools": remove the column')
    return template


def _with_calls(template: Template, messages: Sequence[Message]) -> Template:
    probes = [_with_probes(message) for message in messages]
    expected = sum(len(called_functions(m)) + (m["role"] == "tool") for m in messages)
    forms = [replace(template, as_server=as_server) for as_server in (True, False)]
    rendered = [_rendered(form, probes) for form in forms]
    for form, text in zip(forms, rendered, strict=True):
        if text is not None and text.count(_PROBE) >= expected:
            return form
    if rendered == [None, None]:
        template.render(messages)  # raises, with the template's reason
    raise ValueError("this base's chat template does not render tool calls and their results: remove the row")


def _rendered(template: Template, messages: Sequence[Message]) -> str | None:
    try:
        return template.render(messages)
    except ValueError:
        return None


def _renders(template: Template, texts: list[str], *, as_parts: bool) -> bool:
    """Return whether the template writes the texts of a message, and not the list that holds them."""
    content = texts if as_parts else "\n".join(texts)
    plain = replace(template, as_parts=as_parts, tools=[])
    text = _rendered(plain, [{"role": "user", "content": content}]) or ""
    return all(part in text for part in texts) and "'type'" not in text and '"type"' not in text


def _with_probes(message: Message) -> Message:
    """Return the message with a probe for the name of each called function, and for the result of a call."""
    if message["role"] == "tool":
        return {**message, "content": _PROBE}
    if "tool_calls" not in message:
        return message
    calls = [{"type": "function", "function": {**f, "name": _PROBE}} for f in called_functions(message)]
    return {**message, "tool_calls": calls}
