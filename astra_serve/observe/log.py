"""The lines of the server's log: one for each request to a model, and one for each event of an adapter.

The lines go where vLLM's go. As JSON (vLLM's own formatter) each has the fields below beside its message. A path, a
name or a source cannot forge a line, nor control a terminal: control characters are written as escapes.
"""

import logging
import re
import traceback

from astra_serve.adapters.events import Event
from astra_serve.gateway.request import Request

logger = logging.getLogger("vllm.astra_serve")  # a child of vLLM's logger: its handler, level and format
CONTROL = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"  # with line ends, directions, half characters


def escaped(text: str, *, keep: str = "") -> str:
    """Return `text` with its control characters as Python's escapes, but for those in `keep`."""
    return re.sub(f"[{CONTROL}]", lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def protect() -> None:
    """Escape what requests, documents and sources say in the lines of this process; call it when vLLM has begun to log.

    vLLM's own messages have several lines, but what they are about has one. A traceback has several.
    """
    logging.getLogger("uvicorn.error").addFilter(_escape)
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(_escape)


def _escape(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(escaped(one) if isinstance(one, str) else one for one in record.args)
    if record.name == logger.name:
        record.msg, record.args = escaped(record.getMessage()), ()
    if record.exc_info and record.exc_info[0]:
        record.exc_text = escaped("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"), keep="\n\t")
    return True


def request(ended: Request) -> None:
    """Write a request's tenant, model, version, outcome, tokens and times."""
    fields = {
        "request_id": ended.id,
        "path": escaped(ended.path),
        "tenant": ended.caller.name,
        "model": escaped(ended.model[:256]),
        "adapter": ended.adapter,
        "version": ended.version.name if ended.version else None,
        "status": ended.status,
        "outcome": ended.outcome,
        "prompt_tokens": ended.prompt_tokens,
        "cached_tokens": ended.cached_tokens,
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
    reason = escaped(happened.reason) if happened.reason else None
    fields = {
        "adapter": happened.adapter,
        "event": happened.event,
        "version": happened.version,
        "reason": reason,
        "seconds": {part: round(taken, 4) for part, taken in happened.seconds.items()},
    }
    subject = (
        f"adapter {happened.version or happened.adapter}" if happened.adapter else happened.event.partition("_")[0]
    )
    logger.log(level, "%s: %s%s", subject, happened.event, f": {reason}" if reason else "", extra=fields)
