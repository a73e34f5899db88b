"""What one request may ask for: the faults of a body that vLLM would compute, or parse, for too long.

vLLM checks the length of a prompt in tokens. Before that it parses, renders and tokenises all of it, and some routes
(/tokenize, /detokenize) have no limit at all. `longest_text` is the number of characters that fits into the model's
context if each token is the longest of the vocabulary, so that no longer text does, whatever its tokens are; it is
vLLM's own bound, too. A request that lets vLLM truncate its prompt may be longer.

- `ANSWERS`: `n`, `best_of`, and with beam search the width; `SEQUENCES`: prompts x `n`;
- `INPUTS`: the values of a list in a prompt that are not numbers, as messages or texts to embed; `OBJECTS`: all objects
  and lists in the prompt. The errors that vLLM collects for wrong ones take milliseconds each.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from astra_serve.gateway import json_body, structured
from astra_serve.gateway.json_body import Unusable

ANSWERS = 128
SEQUENCES = 512
INPUTS = 2048
OBJECTS = 20_000

PROMPT = (
    "prompt",
    "suffix",
    "messages",
    "input",
    "inputs",
    "texts",
    "instructions",
    "system",
    "tools",
    "query",
    "queries",
    "documents",
    "items",
    "text_1",
    "text_2",
    "data_1",
    "data_2",
    "chat_template_kwargs",
)
NOT_TEXT = frozenset(  # keys of texts that do not enter the prompt as they are: pictures, names of kinds, ids
    {"url", "data", "image_url", "audio_url", "video_url", "file_data", "encrypted_content", "signature"}
    | {"role", "type", "id", "tool_call_id", "call_id", "tool_use_id"}
)
WHOLE = frozenset(  # routes that make one prompt of all texts
    {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize"}
)
TOKENISING = frozenset({"/tokenize", "/detokenize"})  # routes that never truncate


@dataclass(frozen=True)
class Fault:
    """Why a request is refused with 400, and the parameter that is wrong."""

    message: str
    param: str | None = None


@dataclass(frozen=True)
class Checked:
    """A body as an object, empty if it is none, and its fault."""

    content: dict[str, Any]
    fault: Fault | None = None


def check(path: str, body: bytes, longest_text: int = sys.maxsize) -> Checked:
    """Return the body of a request to a model; a text that is no JSON is for vLLM to report."""
    try:
        content = json_body.parse(body)
    except Unusable as error:
        return Checked({}, Fault(str(error)))
    except (ValueError, RecursionError):
        return Checked({})
    if not isinstance(content, dict):
        return Checked({})
    rules: tuple[Callable[[], Fault | None], ...] = (
        lambda: _priority(content),
        lambda: _sequences(content),
        lambda: _prompt(path, content, longest_text),
        lambda: _tokens(path, content, longest_text),
        lambda: _structured(content),
    )
    return Checked(content, next((fault for rule in rules if (fault := rule())), None))


def _priority(content: dict[str, Any]) -> Fault | None:
    if content.get("priority"):  # the engine's priorities are for its probes: all requests have the same
        return Fault("priority is not served: leave it out", "priority")
    return None


def _sequences(content: dict[str, Any]) -> Fault | None:
    for name in ("n", "best_of"):
        if (answers := _number(content.get(name))) > ANSWERS:
            return Fault(f"{name} is {answers}: a prompt has at most {ANSWERS} answers", name)
    answers = max(1, _number(content.get("n")), _number(content.get("best_of")))
    prompts = max(_prompts(content.get("prompt")), _prompts(content.get("prompt_embeds")))
    if prompts * answers > SEQUENCES:
        most = f"a request has at most {SEQUENCES} answers: send fewer prompts in one request, or a lower n"
        return Fault(f"{prompts} prompts with {answers} answers each are {prompts * answers}; {most}", "prompt")
    return None


def _number(value: Any) -> int:
    """Return an integer as vLLM reads it, which takes texts and whole floats, too; 0 for another value."""
    try:
        return value if isinstance(value, int) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 0


def _prompts(value: Any) -> int:
    """Return the number of prompts in a value, which may be one text, one list of tokens, or a list of them."""
    return 1 if not isinstance(value, list) or (value and isinstance(value[0], int)) else len(value)


def _prompt(path: str, content: dict[str, Any], longest_text: int) -> Fault | None:
    truncates = path not in TOKENISING and content.get("truncate_prompt_tokens") is not None
    objects = 0
    for name in PROMPT:
        total = 0
        for value in _values(content.get(name)):
            if isinstance(value, str):
                total = total + len(value) if path in WHOLE else max(total, len(value))
                continue
            objects += 1
            if isinstance(value, list) and len(value) > INPUTS and not isinstance(value[0], int):
                return Fault(f"a list in {name} has {len(value)} values: {INPUTS} are served in one request", name)
            if objects > OBJECTS:
                return Fault(f"the prompt has more than {OBJECTS} objects and lists: send less in one request", name)
        if total > longest_text and not truncates:
            most = f"the model's context holds at most {longest_text}: shorten it"
            return Fault(f"{name} has a text of {total} characters, and {most}", name)
    return None


def _values(value: Any) -> Iterator[str | dict[str, Any] | list[Any]]:
    """Yield every text, object and list of a value; no number, no text that is none."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str | dict | list):
            yield one
        if isinstance(one, dict):
            left.extend(v for key, v in one.items() if not (key in NOT_TEXT and isinstance(v, str)))
        elif isinstance(one, list) and not (one and isinstance(one[0], int)):
            left.extend(one)


def _tokens(path: str, content: dict[str, Any], longest_text: int) -> Fault | None:
    tokens = content.get("tokens")
    if path == "/detokenize" and isinstance(tokens, list) and len(tokens) > longest_text:
        return Fault(f"there are {len(tokens)} tokens: at most {longest_text} are served in one request", "tokens")
    return None


def _structured(content: dict[str, Any]) -> Fault | None:
    found = structured.fault(content)
    return Fault(*found) if found else None
