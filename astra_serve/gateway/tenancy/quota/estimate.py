"""How many tokens a request may use, estimated before anything is computed for it.

A list of tokens has its length; a text has a third of its bytes in UTF-8, which is more than most tokenizers make of
prose, and less than some make of code or of other scripts. Pictures and sounds count nothing here. When the request
has ended it is charged for the tokens that it has really used.
"""

import re
from collections.abc import Mapping
from typing import Any

from astra_serve.gateway.json_body import strings
from astra_serve.gateway.limits import NOT_TEXT, PROMPT, answers, completed, number

BYTES_PER_TOKEN = 3
MOST = 2**40  # no request uses so many; Redis's scripts count in 64-bit floats
IDS = ("prompt", "input", "tokens")  # parameters that may be tokens
# The routes that generate text, below any --root-path, and the parameters with its length; the first one counts.
ANSWERING: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r".*/v1/chat/completions(/batch)?"), ("max_completion_tokens", "max_tokens")),
    (re.compile(r".*/v1/completions"), ("max_tokens",)),
    (re.compile(r".*/v1/responses"), ("max_output_tokens",)),
    (re.compile(r".*/v1/messages"), ("max_tokens",)),
)


def tokens(path: str, content: Mapping[str, Any], default_max_tokens: int) -> int:
    """Return the tokens of all prompts and of all answers, as long as they may become.

    `default_max_tokens` is the length of an answer whose request says nothing of it.
    """
    size = sum(len(text.encode()) for name in PROMPT & content.keys() for text in _texts(content[name]))
    ids = sum(_ids(content.get(name)) for name in IDS)
    return min(MOST, ids - (-size // BYTES_PER_TOKEN) + _answers(path, content, default_max_tokens))


def _texts(value: Any) -> list[str]:
    return list(strings(value, keys=False, but=NOT_TEXT))


def _ids(value: Any) -> int:
    """Return the tokens in one list of them, or in a list of such lists."""
    if not (isinstance(value, list) and value):
        return 0
    if isinstance(value[0], int):
        return len(value)
    return sum(len(one) for one in value if isinstance(one, list) and one and isinstance(one[0], int))


def _answers(path: str, content: Mapping[str, Any], default_max_tokens: int) -> int:
    names = next((names for pattern, names in ANSWERING if pattern.fullmatch(path)), None)
    if names is None:
        return 0
    given = next((content[name] for name in names if content.get(name) is not None), default_max_tokens)
    messages = content.get("messages")
    conversations = len(messages) if path.endswith("/batch") and isinstance(messages, list) else 1
    return max(0, number(given)) * answers(content) * max(completed(content), conversations)
