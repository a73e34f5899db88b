"""The stations that a request passes on its way to the engine: a limit of what it may use, and a place to compute in.

    admitted -> quota -> lease of its version -> place -> vLLM's handlers

A station is entered before the next one, and left when the request has ended; it refuses a request by an error.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from astra_serve.gateway.request import Request

Station = Callable[[Request, Mapping[str, Any]], AbstractAsyncContextManager[None]]  # of a request and its body


@asynccontextmanager
async def open_to_all(_request: Request, _content: Mapping[str, Any]) -> AsyncIterator[None]:
    """Let every request through at once."""
    yield


@dataclass(frozen=True)
class Stations:
    """The stations of one gateway."""

    quota: Station = open_to_all
    place: Station = open_to_all


OPEN_STATIONS = Stations()
