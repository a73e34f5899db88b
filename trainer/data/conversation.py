"""The messages of a row, checked and brought into the form in which a server gives them to a chat template."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

# Servers accept both names and fill in both; templates read one of them.
_REASONING = ("reasoning_content", "reasoning")


def checked_messages(messages: Sequence[Any]) -> list[Message]:
    """Return copies of the messages without empty fields, with content that is text, or a list of texts.

    Content may be missing beside `tool_calls`, and empty in a tool's result and a system message. Raises ValueError.
    """
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError('each of "messages" needs "role" and a non-empty "content"')
        kept = {key: value for key, value in message.items() if value is not None and value != []}
        kept["content"] = _content(message)
        if kept.get("weight", 1) not in (0, 1):
            raise ValueError(f'"weight" of a message must be 0 or 1, not {kept["weight"]!r}')
        may_be_empty = "tool_calls" in kept or kept["role"] in ("tool", "system", "developer")
        if not may_be_empty and not "".join(kept["content"]).strip():
            raise ValueError('each of "messages" needs "role" and a non-empty "content"')
        reasoning = next((kept[key] for key in _REASONING if isinstance(kept.get(key), str)), None)
        found.append(kept if reasoning is None else {**kept, **dict.fromkeys(_REASONING, reasoning)})
    return found


def learned_turns(messages: Sequence[Message]) -> list[int]:
    """Return the positions of the assistant turns to learn, each from the messages before it.

    They are the last turn without `"weight": 0`, and every turn with `"weight": 1`. Raises ValueError.
    """
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError('"messages" need a question, and at the end the answer to learn, with the role "assistant"')
    weights = {i: m.get("weight") for i, m in enumerate(messages) if i and m["role"] == "assistant"}
    turns = {i for i, weight in weights.items() if weight == 1} | set([i for i in weights if weights[i] != 0][-1:])
    if not turns:
        raise ValueError("every assistant turn has weight 0: there is nothing to learn, remove the row")
    return sorted(turns)


def listed_tools(tools: Any) -> list[Any]:
    """Return the functions of a `tools` column, which may be JSON text. Raises ValueError."""
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools or "[]")
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise ValueError('"tools" must be a list of JSON objects, or JSON text of one')
    return tools or []


def for_template(message: Message, *, as_server: bool, as_parts: bool) -> Message:
    """Return a message as a template gets it.

    `as_server`: arguments of calls parsed, and empty text where there is no content. Otherwise, for templates that can
    only add text to text, arguments as JSON text, and None where there is no content. `as_parts`: content as a list of
    parts, else as text, with line breaks between its parts.
    """
    texts = [message["content"]] if isinstance(message["content"], str) else message["content"]
    content: Any = [{"type": "text", "text": text} for text in texts if text] if as_parts else "\n".join(texts)
    given = {key: value for key, value in message.items() if key != "weight"} | {"content": content}
    if "tool_calls" in message:
        given["tool_calls"] = [_call(call, parsed=as_server) for call in message["tool_calls"]]
        if not content and not as_server:
            given["content"] = None
    return given


def reasoning_of(message: Message) -> str:
    """Return the reasoning that a message has beside its content."""
    found = (message.get(key) for key in (*_REASONING, "thinking"))
    return next((text for text in found if isinstance(text, str)), "")


def called_functions(message: Message) -> list[dict[str, Any]]:
    """Return `{"name", "arguments"}` of each call of a message."""
    return [call.get("function", call) for call in message.get("tool_calls", [])]


def _content(message: Mapping[str, Any]) -> str | list[str]:
    match message.get("content"):
        case str(text):
            return text
        case None if message["role"] == "assistant" and message.get("tool_calls"):
            return ""
        case [_, *_] as parts:
            texts = [part if isinstance(part, str) else part.get("text") for part in parts]
            if all(isinstance(text, str) for text in texts):
                return texts
            raise ValueError('a part of "content" is not text: only {"type": "text", "text": ...} can be learned')
    raise ValueError('each of "messages" needs "role" and a non-empty "content"')


def _call(call: Any, *, parsed: bool) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError('each of "tool_calls" needs "function" with a "name"')
    arguments = function.get("arguments")
    if parsed and (isinstance(arguments, str) or arguments is None):
        with suppress(ValueError):  # a call that is not JSON is learned as it is
            arguments = json.loads(arguments or "{}")
    elif not parsed and not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    made = {**function, "arguments": arguments}
    return {**call, "type": "function", "function": made} if "function" in call else made
