"""The lines of the server's log: one for each request to a model, and one for each event of an adapter.

The lines go where vLLM's go. As JSON (vLLM's own formatter) each has the fields below beside its message.
"""

import logging

from astra_serve.adapters.events import Event
from astra_serve.gateway.request import Request

logger = logging.getLogger("vllm.astra_serve")  # a child of vLLM's logger: its handler, level and format


def request(ended: Request) -> None:
    """Write a request's model, version, outcome, tokens and times."""
    fields = {
        "request_id": ended.id,
        "path": ended.path,
        "model": ended.model[:256],
        "adapter": ended.adapter,
        "version": ended.version.name if ended.version else None,
        "status": ended.status,
        "outcome": ended.outcome,
        "prompt_tokens": ended.prompt_tokens,
        "output_tokens": ended.output_tokens,
        "first_token_s": round(min(ended.first_token_s), 4) if ended.first_token_s else None,
        "seconds": round(ended.seconds, 4),
    }
    model = ended.version.name if ended.version else ended.model[:256]
    logger.info(
        "%s %r %s %s, %d + %d tokens, %.3f s",
        ended.path, model, ended.status, ended.outcome, ended.prompt_tokens, ended.output_tokens, ended.seconds,
        extra=fields,
    )  # fmt: skip


def event(happened: Event) -> None:
    """Write an event of an adapter."""
    level = logging.WARNING if happened.event.endswith("failed") else logging.INFO
    reason = f": {happened.reason}" if happened.reason else ""
    fields = {
        "adapter": happened.adapter,
        "event": happened.event,
        "version": happened.version,
        "reason": happened.reason,
        "seconds": {part: round(taken, 4) for part, taken in happened.seconds.items()},
    }
    adapter = f"adapter {happened.version or happened.adapter}" if happened.adapter else "document"
    logger.log(level, "%s: %s%s", adapter, happened.event, reason, extra=fields)
