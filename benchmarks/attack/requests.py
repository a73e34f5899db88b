"""Hand-made requests to both ports: each must get an answer, or an error in OpenAI's form, and harm nobody."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from benchmarks.attack.target import Target, openai_error

MIB = 2**20
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def attack(target: Target) -> None:
    with httpx.Client(base_url=target.server.url, timeout=90) as http:
        for name, path, content in to_models():
            target.attempt("requests", name, lambda p=path, c=content: openai_error(_post(http, p, c)))
        for method, path in [
            ("GET", "/nonsense"),
            ("DELETE", COMPLETIONS),
            ("PATCH", CHAT),
            ("GET", "/v1/models/none"),
            ("GET", "//"),
            ("POST", "/invocations"),
            ("POST", "/scale_elastic_ep"),
            ("GET", "/v1/responses/none"),
            ("POST", "/generative_scoring"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/reset_prefix_cache"),
            ("POST", "/sleep"),
            ("POST", "/collective_rpc"),
            ("POST", "/abort_requests"),
            ("POST", "/inference/v1/generate"),
        ]:
            target.attempt("requests", f"{method} {path}", lambda m=method, p=path: openai_error(http.request(m, p)))
        for value in ("-100", "1" * 26, "x"):
            target.attempt("requests", f"X-Vllm-Priority: {value}", lambda v=value: _with_priority(http, v))
    for token in (None, target.token):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=target.admin_url, headers=headers, timeout=60) as http:
            for name, content in to_admin():
                label = f"admin, {'with' if token else 'without'} token: {name}"
                target.attempt("requests", label, lambda c=content, t=token: _of_admin(http, c, known=bool(t)))


def to_models() -> Iterator[tuple[str, str, Any]]:
    """Yield a name, the path and the body: bytes as they are, everything else as JSON."""
    prompt = {"model": "sql", "max_tokens": 2}
    for name, change in {
        "no prompt": {},
        "empty prompt": {"prompt": ""},
        "empty list": {"prompt": []},
        "null": {"prompt": None},
        "n 10000": {"prompt": "x", "n": 10_000},
        "n -1": {"prompt": "x", "n": -1},
        "n 1e30": {"prompt": "x", "n": 1e30},
        "10,000 prompts": {"prompt": ["x"] * 10_000},
        "600 prompts x 2": {"prompt": ["x"] * 600, "n": 2},
        "token -1": {"prompt": [-1]},
        "token 2**31": {"prompt": [2**31]},
        "token 2**70": {"prompt": [2**70]},
        "nested lists": {"prompt": [[["x"]]]},
        "best_of": {"prompt": "x", "best_of": 100_000},
        "beam search": {"prompt": "x", "use_beam_search": True, "n": 5000},
        "max_tokens 2**63": {"prompt": "x", "max_tokens": 2**63},
        "temperature 1e308": {"prompt": "x", "temperature": 1e308},
        "top_k huge": {"prompt": "x", "top_k": 2**40},
        "logprobs 10**6": {"prompt": "x", "logprobs": 10**6},
        "prompt_logprobs": {"prompt": "x y z", "prompt_logprobs": 5},
        "echo": {"prompt": "x y z", "echo": True, "logprobs": 2},
        "seed 2**80": {"prompt": "x", "seed": 2**80},
        "stop of 10,000": {"prompt": "x", "stop": ["y"] * 10_000},
        "stop empty": {"prompt": "x", "stop": ""},
        "bad words": {"prompt": "x", "bad_words": ["y"] * 20_000},
        "logit bias": {"prompt": "x", "logit_bias": {"-5": 1e9}},
        "priority": {"prompt": "x", "priority": -5},
        "user is a surrogate": {"prompt": "x", "user": "\ud800"},
        "model is a surrogate": {"prompt": "x", "model": "\udfff"},
        "model with a path": {"prompt": "x", "model": "../../etc"},
        "model of 1 MiB": {"prompt": "x", "model": "m" * MIB},
        "model is a list": {"prompt": "x", "model": ["sql"]},
        "old version": {"prompt": "x", "model": "sql@000000"},
        "truncate": {"prompt": "x", "truncate_prompt_tokens": -7},
        "suffix": {"prompt": "x", "suffix": "y"},
        "stream options": {"prompt": "x", "stream_options": {"x": 1}},
        "cache salt": {"prompt": "x", "cache_salt": "s" * MIB},
        "request id": {"prompt": "x", "request_id": "../" * 1000},
        "allowed tokens": {"prompt": "x", "allowed_token_ids": [-1, 2**40]},
        "min over max": {"prompt": "x", "min_tokens": 9},
        "a text of 7 MiB": {"prompt": "word " * (7 * MIB // 5)},
        "kv transfer": {"prompt": "x", "kv_transfer_params": {"a": 1}},
        "vllm_xargs": {"prompt": "x", "vllm_xargs": {"a": "b"}},
        "ignore_eos to the end": {"prompt": "x", "ignore_eos": True},
        "repetition": {"prompt": "x", "repetition_detection": {"max_pattern_size": 10**9}},
        "thinking": {"prompt": "x", "thinking_token_budget": -1},
    }.items():
        yield name, COMPLETIONS, {**prompt, **change}
    for name, body in {
        "nothing": b"",
        "no JSON": b"{",
        "a list": b"[]",
        "NaN": b'{"model": "sql", "prompt": "x", "temperature": NaN}',
        "1e999": b'{"model": "sql", "prompt": "x", "temperature": 1e999}',
        "deep": b"[" * 100_000,
        "no UTF-8": b'{"model": "\xff"}',
        "key twice": b'{"model": "sql", "model": "base", "prompt": "x", "max_tokens": 1}',
        "bytes of 0": bytes(MIB),
        "a body of 20 MiB": b'{"model": "sql", "prompt": "' + b"x" * 20 * MIB + b'"}',
        "a number of 100,000 digits": b'{"model": "sql", "prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
    }.items():
        yield name, COMPLETIONS, body
    yield from _structured()
    for path in (
        "/tokenize",
        "/detokenize",
        "/v1/messages",
        "/v1/responses",
        "/v1/embeddings",
        "/pooling",
        "/classify",
        "/score",
        "/v1/rerank",
    ):
        yield (
            f"{path}: a text of 7 MiB",
            path,
            {"model": "sql", "prompt": "ab " * (7 * MIB // 3), "input": "ab " * 1000, **HELLO},
        )
        yield f"{path}: nothing", path, {}
        yield (
            f"{path}: wrong types",
            path,
            {"model": {}, "prompt": 7, "input": {"a": 1}, "tokens": "x", "messages": "x"},
        )


def _structured() -> Iterator[tuple[str, str, Any]]:
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    for name, schema in {
        "ref to itself": loop,
        "tree": tree,
        "deep": deep,
        "true": True,
        "pattern": {"type": "string", "pattern": "(a*)*b"},
    }.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield f"schema: {name}", CHAT, {"model": "base", **HELLO, "max_tokens": 2, "response_format": form}
    for name, given in {
        "grammar of 650 KB": {"grammar": "root ::= " + " | ".join(f'"{i}"' for i in range(60_000))},
        "broken grammar": {"grammar": "root ::= ("},
        "broken regex": {"regex": "("},
        "no choice": {"choice": []},
        "regex of 1 MiB": {"regex": "a" * MIB},
        "50,000 choices": {"choice": [str(i) for i in range(50_000)]},
    }.items():
        yield f"structured: {name}", CHAT, {"model": "base", **HELLO, "max_tokens": 2, "structured_outputs": given}


def to_admin() -> Iterator[tuple[str, tuple[str, str, bytes]]]:
    """Yield a name, and the method, path and body of a request to the admin API."""
    paths = (
        "/adapters",
        "/adapters/sql",
        "/events?limit=x",
        "/openapi.json",
        "/adapters/%00",
        "/adapters/..%2f..",
        "/none",
    )
    for path in paths:
        yield path, ("GET", path, b"")
    for name, body in {
        "empty": b"",
        "no JSON": b"{",
        "NaN": b'{"source": NaN}',
        "surrogate": b'{"source": "\\ud800"}',
        "1e999": b'{"source": "x", "weight": 1e999}',
        "5 MiB": b'{"source": "' + b"x" * 5 * MIB + b'"}',
        "deep": b"[" * 50_000,
        "unknown key": b'{"source": "x", "sauce": 1}',
        "no folder": b'{"source": "/none"}',
        "a file": b'{"source": "/etc/passwd"}',
        "a chain": b'{"source": "simplecache::http://127.0.0.1:9/"}',
        "escape": b'{"source": "/tmp/\\u001b[31m\\n{}"}',
    }.items():
        yield f"PUT {name}", ("PUT", "/adapters/attacked", body)
    for call in ("rollback", "canary", "pin", "unload"):
        yield (
            f"POST {call} of nobody",
            ("POST", f"/adapters/nobody/{call}", json.dumps({"source": "x", "weight": 0.5}).encode()),
        )
    yield "DELETE nobody", ("DELETE", "/adapters/nobody", b"")


def _of_admin(http: httpx.Client, request: tuple[str, str, bytes], *, known: bool) -> str | None:
    method, path, body = request
    answer = http.request(method, path, content=body, headers={"Content-Type": "application/json"})
    if not known and answer.status_code != httpx.codes.UNAUTHORIZED:
        return f"{answer.status_code} without a token"
    return openai_error(answer)


def _with_priority(http: httpx.Client, value: str) -> str | None:
    body = {"model": "sql", "prompt": "x", "max_tokens": 1}
    return openai_error(http.post(COMPLETIONS, json=body, headers={"X-Vllm-Priority": value}))


def _post(http: httpx.Client, path: str, content: Any) -> httpx.Response:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return http.post(path, content=text, headers={"Content-Type": "application/json"})
