"""Every name and object of vLLM that we touch."""

import ast
import asyncio
import importlib
import inspect
import socket
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from astra_serve.engine import options, server, vllm_seams
from astra_serve.engine.metered_client import MeteredClient
from astra_serve.errors import ServeError
from astra_serve.gateway import request as requests
from astra_serve.gateway.connection import ConnectionLimits
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.caller import Caller
from tests.astra_serve.world import in_a_loop

PACKAGE = Path(vllm_seams.__file__).parents[1]


def imported() -> dict[str, list[tuple[str, str]]]:
    """Return (module, name) of every import from vLLM by the place of the statement; a `try` is one place."""
    found: dict[str, list[tuple[str, str]]] = {}
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        places = {id(child): node for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vllm":
                for alias in node.names:
                    place = f"{file.name}:{places.get(id(node), node).lineno}:{alias.name}"
                    found.setdefault(place, []).append((node.module, alias.name))
    return found


def exists(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def test_every_name_that_we_import_from_vllm_exists() -> None:
    places = imported()
    assert len(places) > 25
    missing = {place: names for place, names in places.items() if not any(exists(*name) for name in names)}
    assert missing == {}


def test_names_that_vllm_moved_are_imported_from_both_places() -> None:
    (names,) = (names for place, names in imported().items() if place.endswith(":make_arg_parser"))
    modules = {module for module, _ in names}
    assert modules == {"vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args"}


class Client:
    """A client of the engine as `check` expects it."""

    errored = False

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **_: Any) -> Any: ...
    def encode(self) -> Any: ...
    def abort(self) -> Any: ...
    def add_lora(self) -> Any: ...
    def remove_lora(self) -> Any: ...
    def list_loras(self) -> Any: ...
    def collective_rpc(self) -> Any: ...


def test_an_engine_client_that_looks_as_expected_passes() -> None:
    vllm_seams.check(Client())


@pytest.mark.parametrize("name", vllm_seams.CLIENT)
def test_a_method_that_vllm_no_longer_has_is_named_at_start(name: str, monkeypatch) -> None:
    monkeypatch.delattr(Client, name)
    with pytest.raises(ServeError, match=rf"has another EngineClient\.{name} than astra-serve expects"):
        vllm_seams.check(Client())


def test_another_signature_of_generate_is_named_at_start(monkeypatch) -> None:
    monkeypatch.setattr(Client, "generate", lambda _self, _request: None)
    with pytest.raises(ServeError, match=r"another EngineClient\.generate"):
        vllm_seams.check(Client())


@pytest.mark.parametrize("owner", ["OpenAIServingModels"])
def test_another_class_of_vllms_server_is_named_at_start(owner: str, monkeypatch) -> None:
    class Other:
        def __init__(self) -> None: ...

    monkeypatch.setattr(vllm_seams, owner, Other)
    with pytest.raises(ServeError, match=f"has another {owner}"):
        vllm_seams.check(Client())


@in_a_loop
async def test_handlers_get_the_engines_client_with_everything_it_has() -> None:
    metered = MeteredClient(SimpleNamespace(vllm_config="config", errored=True))  # type: ignore[arg-type]
    assert (metered.vllm_config, metered.errored) == ("config", True)
    assert inspect.isasyncgenfunction(metered.generate)


class Recording:
    """A client of the engine that keeps the prompts."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []

    async def generate(self, prompt: Any, *_: Any, **__: Any) -> Any:
        self.prompts.append(prompt)
        for answer in ():
            yield answer

    encode = generate


async def engine_prompt(salt: str | None, prompt: Any, method: str = "generate") -> Any:
    """Return the prompt that the engine gets for one of a request with this salt."""
    client, task = Recording(), asyncio.current_task()
    assert task is not None
    token = requests.current.set(Request("1", "/v1", "a", task, caller=Caller(cache_salt=salt)))
    try:
        metered = MeteredClient(client)  # type: ignore[arg-type]
        async for _ in getattr(metered, method)(prompt, SamplingParams(), "id"):
            pass
    finally:
        requests.current.reset(token)
    (found,) = client.prompts
    return found


@in_a_loop
async def test_a_request_has_the_tokens_of_its_prompt_answer_and_prefix_cache() -> None:
    class Engine:
        async def generate(self, *_: Any, **__: Any) -> Any:
            for ids in ([7], [7, 8]):
                output = SimpleNamespace(token_ids=ids, index=0, finish_reason=None)
                yield SimpleNamespace(metrics=None, outputs=[output], prompt_token_ids=[1, 2, 3], num_cached_tokens=2)

    task = asyncio.current_task()
    assert task is not None
    request = Request("1", "/v1", "a", task)
    token = requests.current.set(request)
    try:
        for _ in range(2):  # two prompts of one request
            async for _ in MeteredClient(Engine()).generate("x", SamplingParams(), "id"):  # type: ignore[arg-type]
                pass
    finally:
        requests.current.reset(token)
    assert (request.prompt_tokens, request.cached_tokens, request.output_tokens) == (6, 4, 4)


@in_a_loop
async def test_tokens_are_charged_at_each_step_and_a_request_with_too_many_sequences_computes_behind_others(
    monkeypatch,
) -> None:
    class Engine:
        async def generate(self, *_: Any, **settings: Any) -> Any:
            given.append(settings.get("priority"))
            for tokens in ([5, 6], [7]):
                output = SimpleNamespace(token_ids=tokens, index=0, finish_reason=None)
                yield SimpleNamespace(metrics=None, outputs=[output], prompt_token_ids=[1], num_cached_tokens=None)

    given, charged = [], []
    request = Request(id="x", path="/v1", model="base", task=asyncio.current_task())  # type: ignore[arg-type]
    request.on_tokens.append(lambda prompt, output: charged.append((prompt, output)))
    monkeypatch.setattr(requests, "current", ContextVar("current", default=request))
    params, prompt = SamplingParams(output_kind=RequestOutputKind.DELTA), {"prompt_token_ids": [1, 2, 3]}
    for request.engine_priority in (0, 1):
        async for _ in MeteredClient(Engine()).generate(prompt, params, "id", priority=0):  # type: ignore[arg-type]
            pass
    assert charged == [(3, 0), (0, 2), (0, 1)] * 2
    assert given == [0, 1]


@pytest.mark.parametrize("method", ["generate", "encode"])
@in_a_loop
async def test_prompts_reach_the_prefix_cache_with_the_salt_of_their_key_and_the_clients_own(method: str) -> None:
    plain = {"type": "token", "prompt_token_ids": [1, 2]}
    assert await engine_prompt("mine", plain, method) == {**plain, "cache_salt": "mine"}
    assert await engine_prompt(None, {**plain, "cache_salt": "own"}, method) == {**plain, "cache_salt": "own"}
    both = {
        (await engine_prompt(salt, {**plain, "cache_salt": own}, method))["cache_salt"]
        for salt in ("mine", "yours")
        for own in ("own", "mine", "yours")
    }
    assert len(both - {"mine", "yours", "own"}) == 6
    assert plain == {"type": "token", "prompt_token_ids": [1, 2]}
    pair = {"type": "enc_dec", "encoder_prompt": plain, "decoder_prompt": plain}
    assert (await engine_prompt("mine", pair, method))["decoder_prompt"]["cache_salt"] == "mine"


@in_a_loop
async def test_a_prompt_that_cannot_have_a_salt_does_not_reach_the_cache() -> None:
    with pytest.raises(TypeError, match="cannot have a salt"):
        await engine_prompt("mine", "text")


@in_a_loop
async def test_a_grammar_that_the_engine_ends_a_request_for_is_the_clients_fault(monkeypatch) -> None:
    class Engine:
        async def generate(self, *_: Any, **__: Any) -> Any:
            output = SimpleNamespace(token_ids=[], index=0, finish_reason="error")
            yield SimpleNamespace(metrics=None, outputs=[output], prompt_token_ids=[1], num_cached_tokens=None)

    async def ask(params: SamplingParams) -> list[Any]:
        return [answer async for answer in MeteredClient(Engine()).generate("x", params, "id")]  # type: ignore[arg-type]

    request = Request(id="x", path="/v1", model="base", task=asyncio.current_task())  # type: ignore[arg-type]
    monkeypatch.setattr(requests, "current", ContextVar("current", default=request))
    assert len(await ask(SamplingParams())) == 1
    assert not request.broke
    with pytest.raises(VLLMValidationError, match="cannot follow the schema or grammar"):
        await ask(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")))
    assert not request.broke


def test_the_first_wrong_item_of_a_responses_request_is_found_alone() -> None:
    good = [{"role": "user", "content": "x"}] * 100
    assert vllm_seams._wrong_items(good) is None
    for wrong in ({}, "x", 3, {"type": "message", "role": "user", "content": [{}]}):
        assert (vllm_seams._wrong_items([*good, wrong, *good]) or "").startswith("input.100 is not an item")
    assert vllm_seams._wrong_items("x") is None
    assert vllm_seams._wrong_items([{}]) is None  # vLLM says more about it


def test_vllm_has_no_keys_of_its_own(tiny_base: Path, monkeypatch) -> None:
    for words, variable in ((["--api-key", "public"], "other"), ([], "public")):
        monkeypatch.setenv("VLLM_API_KEY", variable)
        args = options.parse(str(tiny_base), 0, 1, 0, words)
        assert vllm_seams.take_keys(args) == ["public"]
        assert vllm_seams.take_keys(args) == []


def test_places_are_those_of_all_engines_and_slots_count_where_there_is_one() -> None:
    for engines, places, slots in ((1, 16, 4), (2, 32, None)):
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=engines),
            scheduler_config=SimpleNamespace(max_num_seqs=16),
            lora_config=SimpleNamespace(max_loras=4),
        )
        found = vllm_seams.places(SimpleNamespace(vllm_config=config))  # type: ignore[arg-type]
        assert (found._places, found._slots, found._kept) == (places, slots, 1)


def test_headers_have_our_limits_unless_vllms_options_set_others(tiny_base: Path) -> None:
    def limits(*words: str) -> ConnectionLimits:
        return server.connection_limits(options.parse(str(tiny_base), 0, 1, 0, words))

    assert limits() == ConnectionLimits()
    assert limits("--h11-max-incomplete-event-size", "1000").header_bytes == 1000
    assert limits("--h11-max-header-count", "7").header_count == 7


# vLLM leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_a_port_that_is_in_use_is_one_line_before_the_model_loads(tiny_base) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = options.parse(str(tiny_base), 0, 1, 0, ["--host", "127.0.0.1", "--port", "0"])
        used = options.parse(str(tiny_base), 0, 1, 0, ["--host", "127.0.0.1", "--port", str(port)])
        reason = rf"^cannot serve at 127\.0\.0\.1:{port}: Address already in use$"
        for args, admin in ((used, None), (free, ("127.0.0.1", port))):
            with pytest.raises(ServeError, match=reason), server.bound(args, admin):
                pass
    with server.bound(free, ("127.0.0.1", 0)) as (public, admin):
        assert public.getsockname()[1] != admin.getsockname()[1]
