"""The one place that changes vLLM's objects, or imports names that vLLM 0.32 and 0.33 have in different modules.

    application    vLLM's HTTP application with the gateway behind vLLM's middleware, in front of its handlers;
                   /v1/models lists the adapters; background responses belong to their requests; chats are rendered
                   with the adapter's own template, and sampled by its defaults (`chat`); only the routes of
                   `gateway.routes` are left
    check          verifies that each touched object still looks as expected

`cpu_lora` and `worker_extension` run inside the engine's processes and check what they touch themselves.
"""

import asyncio
import inspect
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.routing import Match
from vllm import SamplingParams, envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.outputs import RequestOutput
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.hf import HfRenderer
from vllm.v1.metrics.stats import RequestStateStats
from vllm.version import __version__ as version

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser as make_arg_parser
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args as validate_parsed_serve_args
except ImportError:  # from 0.33 on
    from vllm.entrypoints.common.cli_args import make_arg_parser as make_arg_parser
    from vllm.entrypoints.common.cli_args import validate_parsed_serve_args as validate_parsed_serve_args

from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.templates import Templates
from astra_serve.engine import background
from astra_serve.engine.chat import OwnTemplates, Sampling
from astra_serve.engine.metered_client import MeteredClient
from astra_serve.errors import ServeError
from astra_serve.gateway import limits
from astra_serve.gateway.limits import Checked, Fault
from astra_serve.gateway.middleware import OPEN, Gateway, Served, Subscribers
from astra_serve.gateway.models import PATH, Models
from astra_serve.gateway.routes import RouteErrors, served
from astra_serve.gateway.tenancy.places import Places
from astra_serve.gateway.tenancy.station import Stations

GENERATE = ["prompt", "sampling_params", "request_id"]
CLIENT = ("generate", "encode", "abort", "add_lora", "remove_lora", "list_loras", "collective_rpc", "errored")


def check(client: EngineClient) -> None:
    """Raise ServeError with the name of the first vLLM object that does not look as expected."""
    for name in CLIENT:
        _expect(hasattr(client, name), f"EngineClient.{name}")
    for name, holds in {
        "EngineClient.generate": list(inspect.signature(client.generate).parameters)[:3] == GENERATE,
        "OpenAIServingModels.lora_requests": "self.lora_requests" in inspect.getsource(OpenAIServingModels.__init__),
        "SamplingParams.update_from_generation_config": list(
            inspect.signature(SamplingParams.update_from_generation_config).parameters
        )[1:]
        == ["generation_config", "eos_token_id"],
        "RequestOutput.num_cached_tokens": "num_cached_tokens" in inspect.signature(RequestOutput).parameters,
        "RequestStateStats": hasattr(RequestStateStats, "__dataclass_fields__")
        and {"first_token_ts", "last_token_ts", "num_generation_tokens"}
        <= RequestStateStats.__dataclass_fields__.keys(),
    }.items():
        _expect(holds, name)


def _expect(holds: bool, name: str) -> None:
    if not holds:
        raise ServeError(f"vLLM {version} has another {name} than astra-serve expects: install vllm 0.32 or 0.33")


async def application(
    client: EngineClient,
    args: Namespace,
    fleet: Fleet,
    subscribers: Subscribers,
    templates: Templates,
    stations: Stations,
) -> tuple[FastAPI, Gateway]:
    """Return vLLM's application around the gateway, and the gateway. Raises ServeError.

    A request passes vLLM's middleware and the operator's `--middleware`, then the gateway, then vLLM's handlers: a
    request that middleware refuses loads nothing.
    """
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(MeteredClient(client), app.state, args, tasks)
    models = app.state.openai_serving_models
    _expect(models.lora_requests == {}, "OpenAIServingModels.lora_requests")
    models.lora_requests = Served()
    if responses := getattr(app.state, "openai_serving_responses", None):
        _hold_background(responses)
    await _use_own_defaults(client, app.state, args, templates)
    paths = {getattr(route, "path", "") for route in app.router.routes}
    _expect(PATH in paths, f"route {PATH}")
    app.router.routes[:] = [r for r in served(app.router.routes) if getattr(r, "path", "") != PATH]
    listed = Models(fleet, client.model_config.max_model_len)
    app.add_api_route(PATH, listed.show_all, methods=["GET"])
    app.add_api_route(PATH + "/{model:path}", listed.show, methods=["GET"])
    if app.openapi_url:
        app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") != app.openapi_url]
        app.add_api_route(app.openapi_url, _openapi(app), methods=["GET"], include_in_schema=False)
    _expect(callable(getattr(app.router, "middleware_stack", None)), "Router.middleware_stack")
    gateway = Gateway(
        RouteErrors(app.router.middleware_stack),
        fleet,
        subscribers,
        abort=client.abort,
        serves=lambda scope: _serves(app, scope),
        stations=stations,
        check=_check(client),
    )
    app.router.middleware_stack = gateway
    return app, gateway


def _hold_background(responses: OpenAIServingResponses) -> None:
    """Let the gateway know the tasks of background responses, and bound what is kept of responses."""
    for name, mine in {
        "background_tasks": background.Tasks(responses),
        "response_store": background.Newest(),
        "msg_store": background.Newest(),
        "event_store": background.Newest(),
    }.items():
        _expect(getattr(responses, name, None) == {}, f"OpenAIServingResponses.{name}")
        setattr(responses, name, mine)


async def _use_own_defaults(client: EngineClient, state: Any, args: Namespace, templates: Templates) -> None:
    """Let requests for an adapter be rendered with its own chat template, and sampled by its own defaults."""
    renderer = client.renderer
    if type(renderer) is HfRenderer:  # others have no Jinja template: their base's format is code
        _expect(hasattr(renderer, "_apply_chat_template_async"), "HfRenderer._apply_chat_template_async")
        own = OwnTemplates(renderer, load_chat_template(args.chat_template), templates, _longest_text(client))
        mine = {"render_messages_async": own.render_messages, "_apply_chat_template_async": own.apply}
        for name, method in mine.items():
            setattr(renderer, name, method)
    handlers = [one for one in vars(state).get("_state", {}).values() if hasattr(one, "default_sampling_params")]
    _expect(bool(handlers) or not hasattr(state, "openai_serving_completion"), "default_sampling_params")
    for handler in handlers:
        handler.default_sampling_params = Sampling(handler.default_sampling_params)
    messages = getattr(state, "anthropic_serving_messages", None)
    if messages is not None and hasattr(messages, "_get_disabled_thinking_effort"):
        # vLLM finds it out at the first request, for all later ones: it must not be one with an adapter's template.
        await messages._get_disabled_thinking_effort()


def _openapi(app: FastAPI) -> Callable[[], Any]:
    async def openapi() -> JSONResponse:
        """Return the description of the served routes; the first time takes seconds, during which others are served."""
        return JSONResponse(await asyncio.to_thread(app.openapi))

    return openapi


def _check(client: EngineClient) -> Callable[[str, bytes], Checked]:
    """Return the check of requests to this model."""
    longest_text = _longest_text(client)

    def check(path: str, body: bytes) -> Checked:
        checked = limits.check(path, body, longest_text)
        wrong = path == "/v1/responses" and not checked.fault and _wrong_items(checked.content.get("input"))
        return replace(checked, fault=Fault(wrong, "input")) if wrong else checked

    return check


def _longest_text(client: EngineClient) -> int:
    """Return the characters of the longest text that can fit into the model's context, whatever its tokens are."""
    tokenizer = client.renderer.tokenizer
    return client.model_config.max_model_len * tokenizer.max_chars_per_token if tokenizer else sys.maxsize


def _wrong_items(items: Any) -> str | None:
    """Return which item of a Responses request is wrong, if there are several.

    vLLM validates all of them at once, and collects up to 233 errors for each that is wrong: 5 s for 1,000 of them.
    """
    for number, item in enumerate(items if isinstance(items, list) and len(items) > 1 else ()):
        try:
            ResponsesRequest.model_validate({"input": [item]})
        except ValueError:
            return f"input.{number} is not an item that can be served: its fields are missing or wrong"
    return None


def take_keys(args: Namespace) -> list[str]:
    """Return the keys of --api-key and VLLM_API_KEY, and take them from vLLM: `gateway.tenancy` asks for keys."""
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    args.api_key = None
    os.environ.pop("VLLM_API_KEY", None)
    return keys


def places(client: EngineClient) -> Places:
    """Return the places for requests in the engine, which may be several with data parallelism.

    An adapter needs a slot in each engine that computes for it: where there are several, slots are not counted.
    """
    config = client.vllm_config
    engines, lora = config.parallel_config.data_parallel_size, config.lora_config
    slots = lora.max_loras if lora and engines == 1 else None
    return Places(config.scheduler_config.max_num_seqs * engines, slots)


def server_info(client: EngineClient) -> dict[str, Any]:
    """Return the engine's settings that trainers read, in the form of vLLM's /server_info.

    An adapter is loaded into all of the engine's processes, so that to trainers there is one data-parallel engine.
    """
    config = client.vllm_config
    lora, parallel = config.lora_config, config.parallel_config
    return {
        "model_config": {
            "model": config.model_config.model,
            "dtype": str(config.model_config.dtype),
            "max_model_len": config.model_config.max_model_len,
        },
        "lora_config": lora and {"max_lora_rank": lora.max_lora_rank, "max_loras": lora.max_loras},
        "parallel_config": {"data_parallel_size": 1, "world_size": parallel.world_size_across_dp},
    }


def _serves(app: FastAPI, scope: Any) -> bool:
    """Return whether a path is one that handles requests to models."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path not in OPEN and any(route.matches(scope)[0] == Match.FULL for route in app.routes)
