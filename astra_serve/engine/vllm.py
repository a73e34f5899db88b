"""The vLLM engine behind its own OpenAI handlers. Only this module, `server` and the engine's plugin import vllm."""

import asyncio
import itertools
import os
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from starlette.routing import Match
from vllm import SamplingParams, TokensPrompt
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics.stats import RequestStateStats

from astra_serve.adapters.admission import base_name
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.residency import HEADROOM
from astra_serve.engine.process_guard import PARENT
from astra_serve.engine.worker_extension import Slots
from astra_serve.errors import ServeError
from astra_serve.gateway import request as requests
from astra_serve.gateway.middleware import OPEN, Gateway, Served
from converter.errors import first_line

# Adapters reach the engine through this process alone: vLLM's own load and unload routes would take any path.
os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ[PARENT] = "1"
if (os.cpu_count() or 1) <= 4:
    # A CPU engine keeps one core free for its other processes; of two cores that is half (measured: 1.25x the tokens).
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

CPU_KV_CACHE = 2**30  # bytes; vLLM's own default is 92 % of the machine's memory, which a laptop does not have free
OURS = (
    "model",
    "served_model_name",
    "revision",
    "lora_modules",
    "enable_lora",
    "max_cpu_loras",
    "worker_extension_cls",
)
# /invocations answers with the base whatever `model` says; and who may ask a model may not scale its engine.
NOT_SERVED = ("/invocations", "/scale_elastic_ep", "/is_scaling_elastic_ep")
ANSWER_S = 10.0  # for the engine to say what is in its slots
PROBE_PRIORITY = 100  # after every request of a user, whose priority is 0
PROBE_TOKENS = 20  # of which log probabilities are asked: vLLM's default maximum


def parse(base: str, rank: int, slots: int, resident: int, extra: Sequence[str]) -> Namespace:
    """Return the settings of vLLM's server for `base`, and LoRAs of up to `rank` (0: none); `extra` is vLLM's own.

    `slots` adapters fit into a batch, `resident` into memory. An option that vLLM does not know exits with vLLM's
    message and status 2. Raises ServeError when `extra` would serve what was not admitted.
    """
    ours = ["--model", base, "--served-model-name", base_name(base), "--scheduling-policy", "priority"]
    ours += ["--worker-extension-cls", f"{Slots.__module__}.{Slots.__qualname__}"]
    if rank:
        ours += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots)]
        ours += ["--max-cpu-loras", str(max(resident, slots) + HEADROOM)]
    sized = any(option.startswith(("--kv-cache-memory-bytes", "--gpu-memory-utilization")) for option in extra)
    if current_platform.is_cpu() and not sized and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        ours += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE)]
    parser = make_arg_parser(FlexibleArgumentParser(prog="astra-serve"))
    alone, args = parser.parse_args(ours), parser.parse_args([*ours, *extra])
    for option in OURS:
        if getattr(args, option) != getattr(alone, option):
            raise ServeError(f"--{option.replace('_', '-')} is not for vLLM here: use --base and --adapter")
    validate_parsed_serve_args(args)
    checked: Namespace = args
    return checked


def compute(args: Namespace) -> None:
    """Compute for an engine whose server is on another node (vLLM's --headless), until it ends."""
    ServeSubcommand.cmd(args)


class VllmEngine:
    """What the fleet asks of the engine."""

    def __init__(self, client: EngineClient, base: str, patience_s: float) -> None:
        """The engine is given up when `in_slots` has waited for it for `patience_s` seconds."""
        self._client, self._base, self._patience_s = client, base, patience_s
        self._asked: asyncio.Task[list[list[int]]] | None = None  # what is in the slots
        self._asked_at = 0.0
        self._names: dict[int, str] = {}
        self._ids = itertools.count(1)  # never used twice: the engine's caches know an adapter by its number and name

    async def load(self, name: str, folder: Path) -> LoRARequest:
        """Read an adapter. Raises ServeError."""
        request = LoRARequest(
            lora_name=name, lora_int_id=next(self._ids), lora_path=str(folder), base_model_name=self._base
        )
        try:
            await self._client.add_lora(request)
        except Exception as error:  # whatever reading it raised in the engine's process
            raise ServeError(f"the engine cannot load it: {first_line(error)}") from error
        self._names[request.lora_int_id] = name
        return request

    async def unload(self, handle: LoRARequest) -> None:
        """Forget an adapter, and make sure that it is forgotten. Raises ServeError."""
        try:
            await self._client.remove_lora(handle.lora_int_id)
            there = handle.lora_int_id in await self._client.list_loras()
        except Exception as error:  # the engine has died, or is about to
            raise ServeError(f"the engine cannot unload it: {first_line(error)}") from error
        if there:
            raise ServeError(f"the engine still holds {handle.lora_name}")
        self._names.pop(handle.lora_int_id, None)

    async def in_slots(self) -> set[str]:
        """Return the names of the adapters that have a slot in the engine's batches. Raises ServeError."""
        if self._asked is None or self._asked.done():  # an engine that hangs is asked once
            self._asked = asyncio.create_task(self._client.collective_rpc("adapters_in_slots"))
            # It may come late, when nobody waits for it any more.
            self._asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
            self._asked_at = time.monotonic()
        try:
            found, *_ = await asyncio.wait_for(asyncio.shield(self._asked), ANSWER_S)
        except TimeoutError as error:
            raise ServeError(f"the engine has not answered for {self._silent_s:.0f} s") from error
        except Exception as error:
            raise ServeError(f"the engine does not say what is in its slots: {first_line(error)}") from error
        return {self._names[number] for number in found if number in self._names}

    def not_ready(self) -> list[str]:
        """Return why it should not be sent requests: it has been silent for a fifth of what is waited for it."""
        silent = self._silent_s > self._patience_s / 5
        return [f"the engine has not answered for {self._silent_s:.0f} s"] if silent else []

    def lost(self) -> str | None:
        """Return why it has to be given up, if it has: it died, or it hangs, as when another of its nodes is gone."""
        if self._client.errored:
            return "the engine has died: its log says why"
        hangs = self._silent_s > self._patience_s
        return f"the engine has not answered for {self._patience_s:.0f} s (--engine-timeout)" if hangs else None

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._asked_at if self._asked and not self._asked.done() else 0.0

    async def next_tokens(
        self, prompts: list[list[int]], handle: LoRARequest | None, *, urgent: bool = False
    ) -> list[dict[int, float]]:
        """Return the log probabilities of the likeliest next tokens after each prompt. Raises ServeError."""
        asked = [self._next(prompt, handle, 0 if urgent else PROBE_PRIORITY) for prompt in prompts]
        found = await asyncio.gather(*asked, return_exceptions=True)  # all have ended: none is left with an adapter
        for answer in found:
            if isinstance(answer, BaseException):
                raise ServeError(f"the engine refuses its probe: {first_line(answer)}") from answer
        return [answer for answer in found if not isinstance(answer, BaseException)]

    def install(self, app: FastAPI, fleet: Fleet, gateway: Gateway) -> None:
        """Put the fleet between the names in requests and the engine's adapters, and the gateway around it all."""
        self._client.generate = _metered(self._client.generate)
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
        gateway.abort = self._client.abort
        gateway.serves = _serves(app)
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in NOT_SERVED]
        # Behind all of vLLM's middleware: what that refuses, as a request without an API key, must not load anything.
        app.router.middleware_stack = gateway.around(app.router.middleware_stack)  # type: ignore[assignment]

    async def _next(self, prompt: list[int], handle: LoRARequest | None, priority: int) -> dict[int, float]:
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=PROBE_TOKENS, ignore_eos=True)
        generator = self._client.generate(
            TokensPrompt(prompt_token_ids=prompt),
            params,
            f"probe-{uuid4().hex}",
            lora_request=handle,
            priority=priority,
        )
        found = None
        async for output in generator:
            found = output.outputs[0].logprobs
        assert found is not None
        return {token: entry.logprob for token, entry in found[0].items()}


def _serves(app: FastAPI) -> Callable[[Any], bool]:
    """Return whether a path is one that handles requests to models."""

    def serves(scope: Any) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path not in OPEN and any(route.matches(scope)[0] == Match.FULL for route in app.routes)

    return serves


def _metered(generate: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """Return the engine's `generate`, which also tells the running request what is computed for it, and how fast."""

    async def counted(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **settings: Any
    ) -> AsyncGenerator[Any, None]:
        request = requests.current.get()
        if request is None:
            async for answer in generate(prompt, sampling_params, request_id, **settings):
                yield answer
            return
        if request.over:  # a handler that was left behind: nobody waits for it, and its adapter may be gone
            raise RuntimeError("the request has ended")
        # The id may be the client's, and another request's, too: to abort this one it needs a name of its own.
        request_id = f"{request_id}-{uuid4().hex[:12]}"
        answers = generate(prompt, sampling_params, request_id, **settings)
        began = time.monotonic() - request.began
        told: dict[int, int] = {}  # tokens by the answer's number
        answer = None
        try:
            with request.computes(request_id):
                async with aclosing(answers):
                    async for answer in answers:
                        if not told and answer.metrics and answer.metrics.num_generation_tokens:
                            request.first_token(began + answer.metrics.first_token_latency)
                        for output in answer.outputs:
                            new = len(output.token_ids)
                            only_new = sampling_params.output_kind == RequestOutputKind.DELTA
                            told[output.index] = told.get(output.index, 0) + new if only_new else new
                        yield answer
        except Exception:
            request.broke = True
            raise
        finally:
            if answer is not None:
                request.prompt_tokens += len(answer.prompt_token_ids or ())
                request.output_tokens += sum(told.values())
                _time(request, answer.metrics)

    return counted


def _time(request: requests.Request, stats: RequestStateStats | None) -> None:
    """Note the engine's own mean time between an answer's tokens; there is none with --disable-log-stats."""
    if stats and stats.num_generation_tokens > 1:
        seconds = stats.last_token_ts - stats.first_token_ts
        request.between_tokens_s.append(seconds / (stats.num_generation_tokens - 1))
