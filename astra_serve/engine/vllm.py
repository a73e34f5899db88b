"""The vLLM engine behind the interface of `adapters.protocol`, and when it has to be given up.

Probes rank below all tenants. They take no place of `gateway.tenancy`: they are in the engine's own queue at once, by
its priority behind every request there. An urgent probe, for which a request or a trainer waits, has the priority of
requests. A probe's sequence lasts for one step, so that a request that finds the engine full of probes begins at the
next step. Requests that the gateway holds back are not in that queue: a probe is computed between two of them.
"""

import asyncio
import itertools
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

from vllm import SamplingParams, TokensPrompt
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.lora.request import LoRARequest

from astra_serve.adapters.admission import base_name
from astra_serve.adapters.clock import Clock
from astra_serve.engine.vllm_seams import check
from astra_serve.errors import EngineLost, ServeError
from converter.errors import first_line

ANSWER_S = 10.0  # for the engine to list the adapters in its slots
PULSE_S = 0.5  # between two looks at whether the engine is lost
PROBE_PRIORITY = 100  # after every request of a user, whose priority is 0
PROBE_TOKENS = 20  # whose log probabilities are asked for: vLLM's default maximum


class VllmEngine:
    """One vLLM engine, by its client."""

    def __init__(self, client: EngineClient, base: str, patience_s: float, clock: Clock) -> None:
        """The engine is lost when `in_slots` has waited for its answer for `patience_s` seconds."""
        self.client = client
        self._base, self._patience_s, self._clock = base, patience_s, clock
        self._asked: asyncio.Task[list[list[int]]] | None = None  # for the adapters in the slots
        self._asked_at = 0.0
        self._names: dict[int, str] = {}
        self._ids = itertools.count(1)  # never used twice: the engine's caches know an adapter by its number and name

    async def load(self, name: str, folder: Path) -> LoRARequest:
        """Read an adapter. Raises ServeError; the engine has forgotten the adapter then."""
        number = next(self._ids)
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder), base_model_name=self._base)
        try:
            await self.client.add_lora(request)
        except Exception as error:  # any error of the engine's process
            with suppress(Exception):  # up to vLLM 0.32 it counts as active before its weights are written
                await self.client.remove_lora(number)
            raise ServeError(f"the engine cannot load it: {first_line(error)}") from error
        self._names[number] = name
        return request

    async def left_out(self, handle: LoRARequest) -> list[str]:
        """Return the modules of a loaded adapter that no worker adapts. Raises ServeError."""
        try:
            of_workers = await self.client.collective_rpc("modules_left_out", args=(handle.lora_int_id,))
        except Exception as error:  # any error of the engine's process
            raise ServeError(f"the engine does not tell which modules it adapts: {first_line(error)}") from error
        return sorted(set.intersection(*map(set, of_workers)))  # of a pipeline, each worker has some of the layers

    async def unload(self, handle: LoRARequest) -> None:
        """Forget an adapter, and verify that it is forgotten. Raises ServeError."""
        try:
            await self.client.remove_lora(handle.lora_int_id)
            there = handle.lora_int_id in await self.client.list_loras()
        except Exception as error:  # the engine has died, or is about to
            raise ServeError(f"the engine cannot unload it: {first_line(error)}") from error
        if there:
            raise ServeError(f"the engine still holds {handle.lora_name}")
        self._names.pop(handle.lora_int_id, None)

    async def in_slots(self) -> set[str]:
        """Return the names of the adapters that have a slot in the engine's batches. Raises ServeError."""
        if self._asked is None or self._asked.done():  # an engine that hangs is asked once
            self._asked = asyncio.create_task(self.client.collective_rpc("adapters_in_slots"))
            # The answer may arrive when no caller waits for it any more.
            self._asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())
            self._asked_at = self._clock.now()
        try:
            found, *_ = await asyncio.wait_for(asyncio.shield(self._asked), ANSWER_S)
        except TimeoutError as error:
            raise ServeError(f"the engine has not answered for {self._silent_s:.0f} s") from error
        except Exception as error:
            raise ServeError(f"the engine does not list the adapters in its slots: {first_line(error)}") from error
        return {self._names[number] for number in found if number in self._names}

    def not_ready(self) -> list[str]:
        """Return a reason where the engine has been silent for a fifth of the time after which it is lost."""
        silent = self._silent_s > self._patience_s / 5
        return [f"the engine has not answered for {self._silent_s:.0f} s"] if silent else []

    def lost(self) -> str | None:
        """Return the reason if the engine is lost: it died, or is silent, as when another of its nodes is gone."""
        if self.client.errored:
            return "the engine has died: its log says why"
        silent = self._silent_s > self._patience_s
        return f"the engine has not answered for {self._patience_s:.0f} s (--engine-timeout)" if silent else None

    async def watch(self) -> None:
        """Raise EngineLost as soon as the engine is lost."""
        before = None
        while not ((lost := self.lost()) and before):  # twice: an answer may be there when this process was frozen
            before = lost
            await self._clock.sleep(PULSE_S)
        raise EngineLost(f"{lost}; start the server again")

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

    async def _next(self, prompt: list[int], handle: LoRARequest | None, priority: int) -> dict[int, float]:
        params = SamplingParams(max_tokens=1, temperature=0, logprobs=PROBE_TOKENS, ignore_eos=True)
        answers = self.client.generate(
            TokensPrompt(prompt_token_ids=prompt),
            params,
            f"probe-{uuid4().hex}",
            lora_request=handle,
            priority=priority,
        )
        found = None
        async for output in answers:
            found = output.outputs[0].logprobs
        assert found is not None
        return {token: entry.logprob for token, entry in found[0].items()}

    @property
    def _silent_s(self) -> float:
        return self._clock.now() - self._asked_at if self._asked and not self._asked.done() else 0.0


@asynccontextmanager
async def started(args: Namespace, patience_s: float, clock: Clock) -> AsyncIterator[VllmEngine]:
    """Start the engine of vLLM's settings `args`, and end it when the block ends. Raises ServeError."""
    async with build_async_engine_client(args) as client:
        check(client)
        await client.collective_rpc("mend_adapters")
        yield VllmEngine(client, base_name(args.model), patience_s, clock)
