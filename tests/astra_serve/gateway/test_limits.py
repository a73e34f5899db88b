"""What one request may ask for, by its path and its body."""

import json
from typing import Any

import pytest

from astra_serve.gateway import limits

CONTEXT = 1000  # characters
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = "x" * 1001


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("path", "content", "param"),
    [
        ("/v1/responses", {"input": [{"role": "assistant", "content": []}]}, "input"),
        ("/v1/responses", {"input": ["x", {"role": "assistant", "content": [{"refusal": "no"}]}]}, "input"),
        (TEXT, {"n": 129}, "n"),
        (TEXT, {"n": "129"}, "n"),
        (TEXT, {"n": 1e9}, "n"),
        (TEXT, {"best_of": 129}, "best_of"),
        (TEXT, {"n": 200, "use_beam_search": True}, "n"),
        (TEXT, {"n": 128, "prompt": ["x"] * 5}, "prompt"),
        (TEXT, {"n": 2, "prompt": [[1, 2]] * 257}, "prompt"),
        (TEXT, {"prompt": ["x"] * 513}, "prompt"),
        (TEXT, {"prompt": [{}] * 513}, "prompt"),
        (TEXT, {"prompt": [-1] * 2049}, "prompt"),
        (TEXT, {"prompt": [1, *["x"] * 2049]}, "prompt"),
        (TEXT, {"prompt": [[1.5] * 10]}, "prompt"),
        (TEXT, {"prompt": [["1"] * 10]}, "prompt"),
        (TEXT, {"prompt": "x" * (2**20 + 1), "truncate_prompt_tokens": 5}, "prompt"),
        (TEXT, {"bad_words": [1] * 2049}, "bad_words"),
        (TEXT, {"stop_token_ids": ["x"] * 2049}, "stop_token_ids"),
        (TEXT, {"logit_bias": {str(n): 1 for n in range(50_001)}}, "logit_bias"),
        (TEXT, {f"x{n}": n for n in range(50_001)}, None),
        (TEXT, {"prompt": [1] * 1001}, "prompt"),
        (TEXT, {"top_k": 2**63}, "top_k"),
        (TEXT, {"structured_outputs": {"x": [1] * 50_000}}, "structured_outputs"),
        (TEXT, {"prompt_embeds": ["x"] * 513}, "prompt"),
        (TEXT, {"prompt": ["x", LONG]}, "prompt"),
        (TEXT, {"prompt": "x", "suffix": LONG}, "suffix"),
        (CHAT, {"messages": said("x" * 600) * 2}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "tool_calls": [{"function": {"arguments": LONG}}]}]}, "messages"),
        (CHAT, {"messages": said("x"), "tools": [{"function": {"parameters": {LONG: LONG}}}]}, "tools"),
        (CHAT, {"messages": [{}] * 2049}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 2000}] * 25}, "messages"),
        (CHAT, {"messages": [1] * 2049}, "messages"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format",
        ),
        ("/v1/responses", {"input": [{}] * 2049}, "input"),
        ("/v1/responses", {"input": "x", "instructions": LONG}, "instructions"),
        ("/v1/messages", {"messages": said("x"), "system": LONG}, "system"),
        ("/v1/messages/count_tokens", {"messages": said(LONG)}, "messages"),
        ("/tokenize", {"prompt": LONG, "truncate_prompt_tokens": 5}, "prompt"),
        ("/tokenize", {"messages": said(LONG)}, "messages"),
        ("/detokenize", {"tokens": [1] * 1001, "truncate_prompt_tokens": 5}, "tokens"),
        ("/v1/embeddings", {"input": ["x"] * 2049}, "input"),
        ("/v1/embeddings", {"input": ["x", LONG]}, "input"),
        ("/v2/embed", {"texts": [LONG]}, "texts"),
        ("/rerank", {"query": "x", "documents": [{"text": LONG}]}, "documents"),
        ("/score", {"text_1": "x", "text_2": [LONG]}, "text_2"),
        (CHAT, {"priority": -1}, "priority"),
        (CHAT, {"priority": -(10**26)}, "priority"),
    ],
)
def test_a_request_for_too_much_is_refused_with_the_parameter(
    path: str, content: dict[str, Any], param: str | None
) -> None:
    found = limits.check(path, json.dumps(content).encode(), CONTEXT)
    assert found.fault
    assert found.fault.param == param
    assert found.content == content


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (TEXT, {"n": 128, "prompt": ["x"] * 4}),
        (TEXT, {"n": None, "prompt": ["x" * 1000] * 512}),
        (TEXT, {"prompt": [1] * 1000, "allowed_token_ids": [1] * 100_000}),
        (TEXT, {"prompt": [[], [1] * 100_000]}),
        (TEXT, {"prompt": [1] * 100_000, "truncate_prompt_tokens": 5}),
        (TEXT, {"prompt": LONG, "truncate_prompt_tokens": 5}),
        (CHAT, {"messages": said("x" * 1000), "priority": 0}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": LONG}}]}]}),
        (CHAT, {"messages": said("x"), "user": LONG, "metadata": {"x": LONG}}),
        ("/v1/messages", {"messages": [{"content": [{"type": "image", "source": {"data": LONG}}]}]}),
        ("/v1/embeddings", {"input": ["x" * 1000] * 2048}),
        ("/v1/embeddings", {"input": [[1, 2]] * 2048}),
        ("/tokenize", {"prompt": "x" * 1000}),
        ("/detokenize", {"tokens": [1] * 1000}),
        (TEXT, {"n": "many", "prompt": {"x": 1}, "best_of": []}),
        (
            "/v1/responses",
            {"input": [{"role": "assistant", "content": [{"text": "x"}]}, {"role": "user", "content": []}]},
        ),
        ("/v1/responses", {"input": [{"role": "assistant", "content": "x"}]}),
        (TEXT, {"n": -1, "messages": None, "input": [], "tokens": "x"}),
    ],
)
def test_other_requests_are_for_the_handlers(path: str, content: dict[str, Any]) -> None:
    assert limits.check(path, json.dumps(content).encode(), CONTEXT).fault is None


@pytest.mark.parametrize("body", [rb'{"user": "\ud800"}', b'{"temperature": NaN}'])
def test_what_cannot_be_written_again_is_refused(body: bytes) -> None:
    assert limits.check(TEXT, body, CONTEXT).fault


@pytest.mark.parametrize("body", [b"[" * 100_000, b"\xff", b'{"n": ' + b"9" * 5000 + b"}"])
def test_what_cannot_be_read_is_refused(body: bytes) -> None:
    assert limits.check(TEXT, body, CONTEXT).fault


@pytest.mark.parametrize("body", [b"", b"{", b"[1]"])
def test_what_is_no_object_is_for_the_handlers_to_report(body: bytes) -> None:
    assert limits.check(TEXT, body, CONTEXT) == limits.Checked({})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, 1),
        ({"prompt": "x", "n": 3}, 3),
        ({"prompt": [1, 2, 3], "best_of": 2}, 2),
        ({"prompt": [[1], [2]], "n": 2}, 4),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, 1),
        ({"messages": [[{"role": "user"}], [{"role": "user"}]]}, 2),  # of /v1/chat/completions/batch
        ({"input": ["x", "y"]}, 2),
        ({"input": [{"role": "user"}, {"role": "user"}]}, 1),  # of /v1/responses
        ({"query": "x", "documents": ["x", "y", "z"]}, 3),
        ({"messages": [], "documents": [{"text": "x"}, {"text": "y"}]}, 1),  # of one prompt
        ({"prompt": "x", "n": "many"}, 1),
    ],
)
def test_the_sequences_of_a_request_are_its_prompts_times_the_answers_of_each(content: dict, expected: int) -> None:
    assert limits.sequences(content) == expected
