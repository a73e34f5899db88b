"""The tokens that requests of each route may use."""

from typing import Any

import pytest

from astra_serve.gateway.tenancy.quota.estimate import tokens

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "123456"}]
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:" + "x" * 900}}]}]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (TEXT, {"prompt": "1234567", "max_tokens": 10}, 3 + 10),
        (TEXT, {"prompt": "äöü", "max_tokens": 10}, 2 + 10),
        (TEXT, {"prompt": "123"}, 1 + 100),
        (TEXT, {"prompt": [1, 2, 3, 4], "max_tokens": 10}, 4 + 10),
        (TEXT, {"prompt": [[1, 2], [3]], "max_tokens": 10}, 3 + 2 * 10),
        (TEXT, {"prompt": ["123", "456"], "max_tokens": 10, "n": 3}, 2 + 2 * 3 * 10),
        (TEXT, {"prompt": "123", "max_tokens": 10, "n": 2, "best_of": 4}, 1 + 4 * 10),
        (TEXT, {"prompt": "123", "max_tokens": 0, "echo": True}, 1),
        (TEXT, {"prompt": "123", "max_tokens": "7"}, 1 + 7),
        (TEXT, {"prompt": "123", "max_tokens": -5, "n": -1}, 1),
        (TEXT, {"prompt": "123", "max_tokens": 2**63 - 1, "n": 100}, 2**40),
        (TEXT, {"prompt": "123", "max_tokens": "many", "n": None}, 1),
        ("/root" + TEXT, {"prompt": "123", "max_tokens": 10}, 1 + 10),
        (CHAT, {"messages": MESSAGES, "max_completion_tokens": 9, "max_tokens": 1}, 2 + 9),
        (CHAT, {"messages": MESSAGES, "max_tokens": 9, "n": 2}, 2 + 2 * 9),
        (CHAT, {"messages": MESSAGES, "max_output_tokens": 1}, 2 + 100),
        (CHAT, {"messages": PICTURE, "max_tokens": 9}, 9),
        (CHAT + "/batch", {"messages": [MESSAGES, MESSAGES], "max_tokens": 9}, 4 + 2 * 9),
        ("/v1/responses", {"input": "123456", "max_output_tokens": 8, "max_tokens": 1}, 2 + 8),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 7}, 2 + 7),
        ("/v1/messages/count_tokens", {"messages": MESSAGES, "max_tokens": 7}, 2),
        ("/v1/embeddings", {"input": ["123", "456"], "max_tokens": 7}, 2),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, 3),
        ("/tokenize", {"prompt": "123456"}, 2),
        ("/detokenize", {"tokens": [1, 2, 3]}, 3),
        (TEXT, {}, 100),
    ],
)
def test_a_request_may_use_its_prompts_and_the_longest_answers(path: str, body: dict[str, Any], expected: int) -> None:
    assert tokens(path, body, default_max_tokens=100) == expected
