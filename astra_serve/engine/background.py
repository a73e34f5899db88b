"""Background responses (`background: true`), which go on when their client has its first answer.

vLLM starts a task for each and keeps results in dictionaries that it never empties. With these in their place the
gateway knows the tasks: the lease of the version lasts until they have ended, as does the drain at SIGTERM. A stream
of a response that was cancelled or has failed ends, where vLLM's would wait for ever.
"""

import asyncio
from collections import UserDict
from collections.abc import Iterator
from typing import Any, TypeVar

from vllm.entrypoints.openai.responses.protocol import ResponseCompletedEvent
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from astra_serve.gateway import request as requests
from astra_serve.gateway.tenancy import caller

KEPT = 256  # responses of a tenant that can be retrieved: the newest ones
KEPT_OF_ALL = 8192  # of all tenants: beyond it the tenant with the most loses its oldest
Value = TypeVar("Value")


class OwnValues(UserDict[str, Value]):
    """A dictionary in which each tenant finds its own keys alone: clients choose ids, and may guess those of others."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Value]] = {}

    @property
    def data(self) -> dict[str, Value]:  # type: ignore[override]
        """Return the values of the tenant of the running request."""
        return self._of.setdefault(caller.current.get().name, {})

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.data))


class Newest(OwnValues[Value]):
    """The newest `KEPT` values of each tenant."""

    def __setitem__(self, key: str, value: Value) -> None:
        own = self.data
        own.pop(key, None)
        own[key] = value
        if len(own) > KEPT:
            del own[next(iter(own))]
        while sum(map(len, self._of.values())) > KEPT_OF_ALL:
            most = max(self._of.values(), key=len)
            del most[next(iter(most))]


class Tasks(OwnValues["asyncio.Task[Any]"]):
    """The tasks of background responses; each belongs to the request that started it."""

    def __init__(self, responses: OpenAIServingResponses) -> None:
        super().__init__()
        self._responses = responses

    def __setitem__(self, response_id: str, task: "asyncio.Task[Any]") -> None:
        super().__setitem__(response_id, task)
        request = requests.current.get()
        if request is not None:
            request.background.add(task)
            task.add_done_callback(lambda _: self._end(response_id, request, task))

    def _end(self, response_id: str, request: requests.Request, task: "asyncio.Task[Any]") -> None:
        """Set the status of a response that has no result, and end its stream."""
        failed = not task.cancelled() and task.exception() is not None
        stored = self._responses.response_store.get(response_id)
        if stored is None:  # newer ones have taken its place
            return
        if failed or stored.status in ("queued", "in_progress"):
            stored.status = "failed"
        request.broke = request.broke or stored.status == "failed"
        request.disconnected = stored.status == "cancelled"
        events, more = self._responses.event_store.get(response_id, (None, None))
        if events is not None and more is not None and (not events or events[-1].type != "response.completed"):
            events.append(
                ResponseCompletedEvent(type="response.completed", sequence_number=len(events), response=stored)
            )
            more.set()
