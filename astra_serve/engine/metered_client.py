"""The engine's client for vLLM's handlers: it notes tokens and times of the running request, and salts its prompts."""

import hmac
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.stats import RequestStateStats

from astra_serve.engine.chat import with_stop_tokens
from astra_serve.gateway import request as requests


class MeteredClient:
    """The engine's client for vLLM's handlers: notes the tokens and times of the running request."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def encode(self, prompt: Any, *settings: Any, **more: Any) -> AsyncGenerator[Any, None]:
        """Return the engine's answers of a pooling model."""
        request = requests.current.get()
        if request:
            request.tokens(_length(prompt), 0)
        found: AsyncGenerator[Any, None] = self._client.encode(
            _salted(prompt, request.caller.cache_salt if request else None), *settings, **more
        )
        return found

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **settings: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield the engine's answers. Raises what the engine raises, RuntimeError for a request that has ended."""
        request = requests.current.get()
        if request is None:
            async for answer in self._client.generate(prompt, sampling_params, request_id, **settings):
                yield answer
            return
        if request.over:  # a handler that was left behind: no client waits for it, and its adapter may be evicted
            raise RuntimeError("the request has ended")
        prompt = _salted(prompt, request.caller.cache_salt)
        if stops := request.defaults.stop_tokens:
            sampling_params = with_stop_tokens(sampling_params, stops, self._client.renderer.get_eos_token_id())
        # The id may be the client's, and another request's, too: to abort this one it needs an id of its own.
        request_id = f"{request_id}-{uuid4().hex[:12]}"
        if request.engine_priority:
            settings["priority"] = request.engine_priority
        request.tokens(_length(prompt), 0)
        answers = self._client.generate(prompt, sampling_params, request_id, **settings)
        began = time.monotonic() - request.began
        tokens: dict[int, int] = {}  # by the answer's number
        answer = None
        try:
            with request.computes(request_id):
                async with aclosing(answers):
                    async for answer in answers:
                        if not tokens and answer.metrics and answer.metrics.num_generation_tokens:
                            request.first_token(began + answer.metrics.first_token_latency)
                        known = sum(tokens.values())
                        for output in answer.outputs:
                            new = len(output.token_ids)
                            only_new = sampling_params.output_kind == RequestOutputKind.DELTA
                            tokens[output.index] = tokens.get(output.index, 0) + new if only_new else new
                        request.tokens(0, sum(tokens.values()) - known)
                        _refuse_grammar(sampling_params, answer)
                        yield answer
        except VLLMValidationError:
            raise
        except Exception:
            request.broke = True
            raise
        finally:
            if answer is not None:
                request.prompt_tokens += len(answer.prompt_token_ids or ())
                request.cached_tokens += answer.num_cached_tokens or 0
                request.output_tokens += sum(tokens.values())
                _note_latency(request, answer.metrics)


def _length(prompt: Any) -> int:
    """Return the tokens of a rendered prompt; 0 where they are not known, as of embeddings."""
    return len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0


def _salted(prompt: Any, salt: str | None) -> Any:
    """Return a rendered prompt whose blocks in the prefix cache are found with this salt alone.

    A client's own salt divides the cache further. Raises TypeError for a prompt that is not rendered: no handler of the
    served routes has one, and it must not reach the cache without a salt.
    """
    if salt is None:
        return prompt
    if not isinstance(prompt, dict):
        raise TypeError(f"a prompt is a {type(prompt).__name__}, which cannot have a salt")
    if "decoder_prompt" in prompt:
        return {**prompt, "decoder_prompt": _salted(prompt["decoder_prompt"], salt)}
    if own := prompt.get("cache_salt"):
        salt = hmac.digest(salt.encode(), own.encode(), "sha256").hex()
    return {**prompt, "cache_salt": salt}


def _refuse_grammar(sampling_params: SamplingParams, answer: Any) -> None:
    """Raise VLLMValidationError, which is 400, where the engine cannot follow the request's grammar.

    The engine compiles it after it has admitted the request, and ends the request as it does after a fault of its own.
    """
    if sampling_params.structured_outputs and any(output.finish_reason == "error" for output in answer.outputs):
        raise VLLMValidationError(
            "the engine cannot follow the schema or grammar of the request's structured output: it does not compile, "
            "or allows no text",
            parameter="structured_outputs",
        )


def _note_latency(request: requests.Request, stats: RequestStateStats | None) -> None:
    """Note the engine's own mean time between an answer's tokens; there is none with --disable-log-stats."""
    if stats and stats.num_generation_tokens > 1:
        seconds = stats.last_token_ts - stats.first_token_ts
        request.between_tokens_s.append(seconds / (stats.num_generation_tokens - 1))
