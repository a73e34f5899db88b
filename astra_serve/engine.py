"""The vLLM engine behind its own OpenAI handlers. Only this module and the engine's plugin beside it import vllm."""

import asyncio
import itertools
import os
import signal
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import uvicorn
import uvloop
from fastapi import FastAPI
from vllm import SamplingParams, TokensPrompt, envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import NoSignalServer, serve_http, setup_server
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from astra_serve.admission import base_name
from astra_serve.errors import ServeError
from astra_serve.fleet import Fleet
from astra_serve.gateway import Leases, Served

# Adapters reach the engine through this process alone: vLLM's own load and unload routes would take any path.
os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if (os.cpu_count() or 1) <= 4:
    # A CPU engine keeps one core free for its other processes; of two cores that is half (measured: 1.25x the tokens).
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

CPU_KV_CACHE = 2**30  # bytes; vLLM's own default is 92 % of the machine's memory, which a laptop does not have free
PROBE_PRIORITY = 100  # after every request of a user, whose priority is 0
PROBE_TOKENS = 20  # of which log probabilities are asked: vLLM's default maximum


def parse(base: str, rank: int, slots: int, resident: int, extra: Sequence[str]) -> Namespace:
    """Return the settings of vLLM's server for `base`, and LoRAs of up to `rank` (0: none); `extra` is vLLM's own.

    `slots` adapters fit into a batch, `resident` into memory. An option that vLLM does not know exits with vLLM's
    message and status 2. Raises ServeError when `extra` would serve what was not admitted.
    """
    ours = ["--model", base, "--served-model-name", base_name(base), "--scheduling-policy", "priority"]
    if rank:
        ours += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots)]
        ours += ["--max-cpu-loras", str(max(resident, slots))]
    sized = any(option.startswith(("--kv-cache-memory-bytes", "--gpu-memory-utilization")) for option in extra)
    if current_platform.is_cpu() and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        ours += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE)]
    parser = make_arg_parser(FlexibleArgumentParser(prog="astra-serve"))
    alone, args = parser.parse_args(ours), parser.parse_args([*ours, *extra])
    for option in ("model", "served_model_name", "revision", "lora_modules", "enable_lora", "max_cpu_loras"):
        if getattr(args, option) != getattr(alone, option):
            raise ServeError(f"--{option.replace('_', '-')} is not for vLLM here: use --base and --adapter")
    validate_parsed_serve_args(args)
    checked: Namespace = args
    return checked


class VllmEngine:
    """What the fleet asks of the engine."""

    def __init__(self, client: EngineClient, base: str) -> None:
        self._client, self._base = client, base
        self._ids = itertools.count(1)  # never used twice: the engine's caches know an adapter by its number and name

    async def load(self, name: str, folder: Path) -> LoRARequest:
        """Read an adapter. Raises ServeError."""
        request = LoRARequest(
            lora_name=name, lora_int_id=next(self._ids), lora_path=str(folder), base_model_name=self._base
        )
        try:
            await self._client.add_lora(request)
        except Exception as error:  # whatever reading it raised in the engine's process
            raise ServeError(f"the engine cannot load it: {_first_line(error)}") from error
        return request

    async def unload(self, handle: LoRARequest) -> None:
        """Forget an adapter, and make sure that it is forgotten. Raises ServeError."""
        await self._client.remove_lora(handle.lora_int_id)
        if handle.lora_int_id in await self._client.list_loras():
            raise ServeError(f"the engine still holds {handle.lora_name}")

    async def next_tokens(self, prompts: list[list[int]], handle: LoRARequest | None) -> list[dict[int, float]]:
        """Return the log probabilities of the likeliest next tokens after each prompt."""
        asked = [self._next(prompt, handle) for prompt in prompts]
        found = await asyncio.gather(*asked, return_exceptions=True)  # all have ended: none is left with an adapter
        for answer in found:
            if isinstance(answer, BaseException):
                raise ServeError(f"the engine refuses its probe: {_first_line(answer)}") from answer
        return [answer for answer in found if not isinstance(answer, BaseException)]

    async def _next(self, prompt: list[int], handle: LoRARequest | None) -> dict[int, float]:
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=PROBE_TOKENS, ignore_eos=True)
        generator = self._client.generate(
            TokensPrompt(prompt_token_ids=prompt),
            params,
            f"probe-{uuid4().hex}",
            lora_request=handle,
            priority=PROBE_PRIORITY,
        )
        found = None
        async for output in generator:
            found = output.outputs[0].logprobs
        assert found is not None
        return {token: entry.logprob for token, entry in found[0].items()}


# What runs beside the HTTP server: given the engine and the application, it starts, and is cancelled at the end.
Start = Callable[[VllmEngine, FastAPI], Awaitable[Fleet]]


def serve(args: Namespace, start: Start) -> None:
    """Run engine and HTTP server until SIGTERM or SIGINT, with what `start` makes of them."""
    uvloop.run(_serve(args, start))


async def _serve(args: Namespace, start: Start) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, interrupt)  # until the HTTP server has handlers of its own
    _, sock = setup_server(args, reuse_port=False)
    async with build_async_engine_client(args) as client:
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        fleet = await start(VllmEngine(client, base_name(args.model)), app)
        _install(app, fleet)
        ended = await serve_http(
            app,
            sock=sock,
            enable_ssl_refresh=args.enable_ssl_refresh,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
        )
    try:
        await ended
    finally:
        sock.close()


def _install(app: FastAPI, fleet: Fleet) -> None:
    """Put the fleet between the names in requests and the engine's adapters."""
    models = app.state.openai_serving_models
    models.lora_requests = Served()
    only_base = models.registry.show_available_models

    async def show_available_models() -> ModelList:
        found: ModelList = await only_base()
        parent = found.data[0].id
        found.data += [
            ModelCard(id=name, root=alias.current.name, parent=parent, permission=[ModelPermission()])
            for name, alias in fleet.aliases.items()
        ]
        return found

    models.show_available_models = show_available_models
    # Behind all of vLLM's middleware: what that refuses, as a request without an API key, must not load anything.
    app.router.middleware_stack = Leases(app.router.middleware_stack, fleet)


async def serve_admin(app: FastAPI, host: str, port: int) -> None:
    """Serve the admin API until cancelled."""
    await NoSignalServer(uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False)).serve()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
