"""In front of vLLM's handlers: a request's `model` is resolved once, and its version leased until the last byte.

The version of a response that is computed in the background is leased until that work has ended.

The handlers look adapters up in a mapping (`Served`). It has the version of the running request and nothing else:
whatever happens to the alias meanwhile, a request finds the version that it was admitted with.
"""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.residency import PAST_DEADLINE
from astra_serve.errors import LimitExceeded, Unavailable, UnknownAdapter
from astra_serve.gateway import limits
from astra_serve.gateway import request as requests
from astra_serve.gateway.errors import error_body
from astra_serve.gateway.limits import Checked
from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy import caller
from astra_serve.gateway.tenancy.station import OPEN_STATIONS, Stations
from astra_serve.gateway.tenancy.view import View

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("vllm.astra_serve")
# Headers of routers in front of vLLM, which set the priority, and the engine, of a request: no client may.
INTERNAL = frozenset({b"x-vllm-priority", b"x-data-parallel-rank"})
REQUEST_ID = rb"[A-Za-z0-9._:-]{1,128}"
OPEN = frozenset({"/health", "/livez", "/readyz", "/metrics", "/ping"})  # the server's state: no models, no API keys


class Served(Mapping[str, Any]):
    """The adapter of the running request under the name that it asked for; empty for every other request."""

    def __getitem__(self, model: str) -> Any:
        request = requests.current.get()
        if request is None or request.version is None or request.model != model:
            raise KeyError(model)
        return request.handle

    def __iter__(self) -> Iterator[str]:
        request = requests.current.get()
        return iter(() if request is None or request.version is None else (request.model,))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Subscribers:
    """The functions that are called with requests."""

    first_token: list[Callable[[Request, float], None]] = field(default_factory=list)  # with the seconds until then
    ended: list[Callable[[Request], None]] = field(default_factory=list)


class Gateway:
    """ASGI middleware that admits requests to models, leases the version of each one's `model`, and lists them all."""

    def __init__(
        self,
        app: App,
        fleet: Fleet,
        subscribers: Subscribers,
        *,
        abort: Callable[[set[str]], Awaitable[None]],
        serves: Callable[[Scope], bool],
        check: Callable[[str, bytes], Checked] = limits.check,
        stations: Stations = OPEN_STATIONS,
    ) -> None:
        """`abort` ends the engine's work by its ids; `serves` says whether a request is one to a model.

        `check` reads the body of a request, by its path. A request passes the quota of `stations` before its
        version is leased, and their place after that.
        """
        self.running: set[Request] = set()
        self.drained = False  # by an operator: not ready, but requests that arrive all the same are served
        self.closed: str | None = None  # why no request is admitted any more
        self._app, self._fleet, self._subscribers = app, fleet, subscribers
        self._abort, self._serves, self._check, self._stations = abort, serves, check, stations
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a request to a model; hand any other one on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "POST" and self._serves(scope):
            await self._admit(scope, receive, send)
        else:
            await self._hand_on(scope, receive, send)

    def not_ready(self) -> list[str]:
        """Return the reasons why requests should be sent to another server."""
        return [reason for reason in (self.closed, "drained by an operator" if self.drained else None) if reason]

    async def close(self, reason: str, finish_s: float) -> None:
        """Admit no request any more, and wait for those that run; after `finish_s` seconds cancel them."""
        self.closed = reason
        try:
            await asyncio.wait_for(self._idle.wait(), finish_s)
        except TimeoutError:
            for request in self.running:
                request.task.cancel(PAST_DEADLINE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), requests.CLOSING_S)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, replay = await _read(receive)
        checked = self._check(_path(scope), body)
        model = checked.content.get("model")
        if not (model and isinstance(model, str)):  # the base, as vLLM reads it, or a mistake that the handler reports
            model = self._fleet.base_name
        view = View(self._fleet, caller.current.get())
        request = Request(
            id=_request_id(scope),
            path=scope["path"],
            model=model,
            task=_this_task(),
            adapter=view.known(model),
            caller=caller.current.get(),
            on_first_token=self._subscribers.first_token,
        )
        request.left = partial(_disconnect, receive, request)
        send = _recorded(send, request)
        self.running.add(request)
        self._idle.clear()
        try:
            await self._serve(request, checked, view, scope, _watched(replay, request), send)
        except asyncio.CancelledError as error:
            if error.args != (PAST_DEADLINE,):
                raise
            await _cut_off(send, request)
            request.task.uncancel()
        except Exception:
            request.broke = True
            raise
        finally:
            self.running.discard(request)
            if not self.running:
                self._idle.set()
            for subscriber in self._subscribers.ended:
                subscriber(request)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(id=_request_id(scope), path=scope["path"], model="", task=_this_task())
        await self._call(request, scope, receive, _recorded(send, request))

    async def _call(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the handlers answer. What they raise is logged, and is a 500 if the answer has not begun."""
        try:
            await self._app(scope, receive, send)
        except HTTPException:  # the router has no such path or method
            raise
        except Exception:
            request.broke = True
            if request.status is not None:
                raise
            facts = {"request_id": request.id, "status": 500}
            logger.exception("%s 500, request %s", request.path, request.id, extra=facts)
            await refuse(send, 500, f"the server has failed: its log has the reason beside the id {request.id}")

    async def _serve(
        self, request: Request, checked: Checked, view: View, scope: Scope, receive: Receive, send: Send
    ) -> None:
        content = {} if checked.fault else checked.content  # a faulty request counts as one, whatever it asks for
        user = content.get("user")
        if self.closed:
            await refuse(send, 503, f"{self.closed}: ask again, of another server", None, 1)
            return
        scope["headers"] = [header for header in scope["headers"] if header[0] not in INTERNAL]
        try:
            share_by = user if user and isinstance(user, str) else request.id  # of a canary
            async with self._stations.quota(request, content):
                if checked.fault:
                    await refuse(send, 400, checked.fault.message, checked.fault.param)
                    return
                async with view.lease(request.model, share_by) as residence:
                    if residence:
                        request.version, request.handle = residence.version, residence.handle
                        request.defaults = residence.defaults
                    if residence and residence.adapts_head and _asks_prompt_logprobs(content):
                        reason = "log probabilities of the prompt are not served for an adapter of lm_head: "
                        await refuse(send, 400, f"{reason}leave them out", "prompt_logprobs")
                        return
                    async with self._stations.place(request, content):
                        await self._compute(request, scope, receive, send)
        except LimitExceeded as error:
            if error.retry_after_s is None:  # OpenAI's clients would send the request again, which never fits
                request.answer_headers.append((b"x-should-retry", b"false"))
            await refuse(send, 429, str(error), None, error.retry_after_s, kind=error.kind)
        except Unavailable as error:
            await refuse(send, 503, str(error), "model", error.retry_after_s)
        except UnknownAdapter as error:
            await refuse(send, 404, str(error), "model")
        except ClientDisconnect:
            await refuse(send, requests.DISCONNECTED, "the client has disconnected")

    async def _compute(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the handlers answer, and end the work for the request."""
        token = requests.current.set(request)
        try:
            await self._call(request, scope, receive, send)
            if request.background and not request.broke:
                await asyncio.wait(request.background)
        finally:
            requests.current.reset(token)
            await self._finish(request)

    async def _finish(self, request: Request) -> None:
        """End the work for a request, in the background and in the engine: its version is leased until then.

        A handler that is cancelled leaves a task of its own behind, which goes on.
        """
        request.over = True
        for task in request.background:
            task.cancel()
        if request.background:
            await asyncio.wait(request.background, timeout=requests.CLOSING_S)
        if request.computing:
            await self._abort(set(request.computing))
            await request.computed()


def _asks_prompt_logprobs(content: dict[str, Any]) -> bool:
    """Return whether a request asks for log probabilities of its prompt; `echo` of completions repeats the prompt."""
    echoed = bool(content.get("echo")) and content.get("logprobs") is not None
    return echoed or content.get("prompt_logprobs") is not None


def _this_task() -> "asyncio.Task[object]":
    task = asyncio.current_task()
    assert task is not None
    return task


def _request_id(scope: Scope) -> str:
    """Return the request's id: the client's, where the client gives one; otherwise a new one, for the handlers, too."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    if re.fullmatch(REQUEST_ID, given):
        return str(given.decode())
    new = uuid4().hex
    others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    scope["headers"] = [*others, (b"x-request-id", new.encode())]
    return new


def _watched(receive: Receive, request: Request) -> Receive:
    async def watched() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not request.complete and not request.background:
            request.disconnected = True
        return message

    return watched


async def _disconnect(receive: Receive, request: Request) -> None:
    """Wait until the client of a request disconnects, whose body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    request.disconnected = True


def _recorded(send: Send, request: Request) -> Send:
    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            request.status = message["status"]
            request.streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            added = [(b"x-request-id", request.id.encode()), *request.answer_headers]
            message = {**message, "headers": [*message["headers"], *added]}
        elif not message.get("more_body"):
            request.complete = True
        await send(message)

    return recorded


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """Return the whole body, and a `receive` that repeats its messages before it receives later ones."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)
    left = iter(messages)

    async def replay() -> Message:
        message = next(left, None)
        return await receive() if message is None else message

    return body, replay


def _path(scope: Scope) -> str:
    """Return the path of a request below `--root-path`."""
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


async def _cut_off(send: Send, request: Request) -> None:
    """End a request past its deadline with an error that clients understand."""
    request.broke = True
    if request.status is None:
        await refuse(send, 503, PAST_DEADLINE, None, 1)
    elif request.streams and not request.complete:
        error = json.dumps({"error": {"message": PAST_DEADLINE, "type": "ServiceUnavailableError", "code": 503}})
        await send({"type": "http.response.body", "body": f"data: {error}\n\n".encode()})


async def refuse(
    send: Send,
    status: int,
    message: str,
    param: str | None = None,
    retry_after_s: int | None = None,
    *,
    kind: str | None = None,
) -> None:
    """Answer with an error in OpenAI's format; `kind` is its type, by default the usual one of the status."""
    body = error_body(status, message, param, kind)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
