"""What one request may ask for: the faults of a body that vLLM would compute, or parse, for too long.

vLLM checks the length of a prompt in tokens. Before that it parses, renders and tokenises all of it, and some routes
(/tokenize, /detokenize) have no limit at all. `longest_text` is the number of characters that fits into the model's
context if each token is the longest of the vocabulary, so that no longer text does, whatever its tokens are; it is
vLLM's own bound, too.

- `ANSWERS`: `n`, `best_of`, and with beam search the width; `SEQUENCES`: prompts x `n`;
- `VALUES`: all values of a body; `INPUTS`: those of one list, as messages or texts to embed. Lists of tokens count in
  neither. vLLM collects up to fifteen errors for a wrong value while other requests wait: 16 s for a million errors;
- `TRUNCATED`: characters of a text that vLLM is to truncate, if that is more than `longest_text`: it tokenises all of
  it.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from astra_serve.gateway import json_body, structured

ANSWERS = 128
SEQUENCES = 512
INPUTS = 2048
VALUES = 50_000
TRUNCATED = 2**20
INTEGERS = range(-(2**63), 2**63)  # that the engine's messages can have

PROMPT = frozenset(  # parameters whose texts enter a prompt
    {"prompt", "suffix", "messages", "input", "inputs", "texts", "instructions", "system", "tools", "documents"}
    | {"query", "queries", "items", "text_1", "text_2", "data_1", "data_2", "chat_template_kwargs"}
)
NOT_TEXT = frozenset(  # keys of texts that do not enter the prompt as they are: pictures, names of kinds, ids
    {"url", "data", "image_url", "audio_url", "video_url", "file_data", "encrypted_content", "signature"}
    | {"role", "type", "id", "tool_call_id", "call_id", "tool_use_id"}
)
WHOLE = frozenset(  # routes that make one prompt of all texts
    {"/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize"}
)
TOKENS = frozenset({"prompt", "input", "tokens", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"})
SEVERAL = ("input", "inputs", "messages", "texts", "text_2", "data_2", "documents")  # that can be a list of prompts
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
    except json.JSONDecodeError:
        return Checked({})
    except (ValueError, RecursionError):
        return Checked({}, Fault(json_body.fault(body) or ""))
    if not isinstance(content, dict):
        return Checked({})
    rules: tuple[Callable[[], Fault | None], ...] = (
        lambda: _priority(content),
        lambda: _integers(content),
        lambda: _sequences(content),
        lambda: _values(content),
        lambda: _texts(path, content, longest_text),
        lambda: _tokens(path, content, longest_text),
        lambda: _structured(content),
        lambda: _earlier_answers(path, content),
    )
    return Checked(content, next((fault for rule in rules if (fault := rule())), None))


def sequences(content: Mapping[str, Any]) -> int:
    """Return how many sequences the engine computes for a body that was checked: prompts x answers of each."""
    return answers(content) * max(1, completed(content), *(_texts_in(content.get(name)) for name in SEVERAL))


def answers(content: Mapping[str, Any]) -> int:
    """Return how many answers each prompt of a body gets."""
    return max(1, number(content.get("n")), number(content.get("best_of")))


def completed(content: Mapping[str, Any]) -> int:
    """Return the number of prompts that a body wants to be completed, 1 where it has no such parameter."""
    return max(prompts(content.get("prompt")), prompts(content.get("prompt_embeds")))


def _texts_in(value: Any) -> int:
    """Return the prompts in a list of texts, or of lists; objects in a list are messages, or parts of one prompt."""
    return prompts(value) if isinstance(value, list) and value and not isinstance(value[0], dict) else 1


def _priority(content: dict[str, Any]) -> Fault | None:
    if content.get("priority"):  # the engine's priorities are for its probes: all requests have the same
        return Fault("priority is not served: leave it out", "priority")
    return None


def _integers(content: dict[str, Any]) -> Fault | None:
    for name, value in content.items():
        if isinstance(value, int) and value not in INTEGERS:
            return Fault(f"{name} is out of range: an integer has at most 64 bits", name)
    return None


def _sequences(content: dict[str, Any]) -> Fault | None:
    for name in ("n", "best_of"):
        if (asked := number(content.get(name))) > ANSWERS:
            return Fault(f"{name} is {asked}: a prompt has at most {ANSWERS} answers", name)
    texts, each = completed(content), answers(content)
    if texts * each > SEQUENCES:
        most = f"a request has at most {SEQUENCES} answers: send fewer prompts in one request, or a lower n"
        return Fault(f"{texts} prompts with {each} answers each are {texts * each}; {most}", "prompt")
    return None


def number(value: Any) -> int:
    """Return an integer as vLLM reads it, which takes texts and whole floats, too; 0 for another value."""
    try:
        return value if isinstance(value, int) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        return 0


def prompts(value: Any) -> int:
    """Return the number of prompts in a value, which may be one text, one list of tokens, or a list of them."""
    return 1 if not isinstance(value, list) or (value and isinstance(value[0], int)) else len(value)


def _values(content: dict[str, Any]) -> Fault | None:
    left = [(name, value) for name, value in content.items() if name not in structured.FIELDS]
    count = len(content)
    if count > VALUES:
        return Fault(f"the request has {count} parameters: send those that the API has")
    while left:
        name, value = left.pop()
        if not isinstance(value, dict | list) or (name in TOKENS and _are_tokens(value)):
            continue
        if isinstance(value, list):
            if len(value) > INPUTS:
                return Fault(
                    f"a list in {name} has {len(value)} values: {INPUTS} are served, unless all are tokens", name
                )
            if name == "prompt" and value is not content[name]:
                return Fault("a prompt is a text, or a list of tokens, which are whole numbers from 0", name)
        count += len(value)
        if count > VALUES:
            return Fault(f"the request has more than {VALUES} values: send less in one request", name)
        left.extend((name, child) for child in (value.values() if isinstance(value, dict) else value))
    return None


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0


def _texts(path: str, content: dict[str, Any], longest_text: int) -> Fault | None:
    if _truncates(path, content):
        longest_text = max(longest_text, TRUNCATED)
    for name in PROMPT & content.keys():
        lengths = [len(text) for text in json_body.strings(content[name], keys=False, but=NOT_TEXT)]
        length = sum(lengths) if path in WHOLE else max(lengths, default=0)
        if length > longest_text:
            most = f"a prompt of this model has at most {longest_text}: shorten it"
            return Fault(f"{name} has a text of {length} characters, and {most}", name)
    return None


def _tokens(path: str, content: dict[str, Any], longest_text: int) -> Fault | None:
    name = "tokens" if path == "/detokenize" else "prompt"
    tokens = content.get(name)
    if not isinstance(tokens, list) or _truncates(path, content) or len(tokens) <= longest_text:
        return None
    return Fault(f"{name} has {len(tokens)} tokens, and a prompt of this model has fewer than {longest_text}", name)


def _truncates(path: str, content: dict[str, Any]) -> bool:
    return path not in TOKENISING and content.get("truncate_prompt_tokens") is not None


def _earlier_answers(path: str, content: dict[str, Any]) -> Fault | None:
    """Refuse what vLLM's handler fails on: an answer of the assistant whose first part has no text."""
    items = content.get("input")
    for number, item in enumerate(items if path == "/v1/responses" and isinstance(items, list) else ()):
        parts = item.get("content") if isinstance(item, dict) and item.get("role") == "assistant" else None
        if isinstance(parts, list) and not (parts and isinstance(parts[0], dict) and "text" in parts[0]):
            return Fault(f"input.{number} is an answer whose first part has no text: leave it out", "input")
    return None


def _structured(content: dict[str, Any]) -> Fault | None:
    found = structured.fault(content)
    return Fault(*found) if found else None
