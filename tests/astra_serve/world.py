"""One server with a stand-in for the engine, a real store and a clock that tests move by hand."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import httpx

from astra_serve.adapters.admission import Base
from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Events
from astra_serve.adapters.fetch import Sources
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.loading import Loader
from astra_serve.adapters.residency import Residency
from astra_serve.adapters.schedule import Limits, Residence
from astra_serve.adapters.store import Store
from astra_serve.adapters.upload_target import UploadTarget
from astra_serve.adapters.version import Version
from astra_serve.control import admin, policy_port
from astra_serve.control.control import Control
from astra_serve.control.desired_state import DesiredState
from astra_serve.control.housekeeping import Housekeeping
from astra_serve.control.policies import Policies
from astra_serve.control.preparation import Preparation
from astra_serve.control.readiness import RequiredAdapters
from astra_serve.control.reconcile import Reconciler
from astra_serve.control.status import Status
from astra_serve.control.uploads import Uploads
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter
from astra_serve.gateway.middleware import App, Gateway, Subscribers
from tests.astra_serve.stand_in import StandInEngine

TOKEN, POLICY_TOKEN = "secret", "policy-secret"


# Of the engine, as `vllm_seams.server_info` returns it.
INFO = {
    "model_config": {"model": "base", "dtype": "torch.float32", "max_model_len": 2048},
    "lora_config": {"max_lora_rank": 64, "max_loras": 8},
    "parallel_config": {"data_parallel_size": 1, "world_size": 2},
}


class ManualClock(Clock):
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._waits: set[tuple[float, asyncio.Event]] = set()

    def now(self) -> float:
        return self._now

    async def wait(self, event: asyncio.Event, until: float = math.inf) -> bool:
        due = asyncio.Event()
        if until <= self._now:
            due.set()
        self._waits.add((until, due))
        waits = [asyncio.ensure_future(one.wait()) for one in (event, due)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waits.discard((until, due))
            for one in waits:
                one.cancel()
        return event.is_set()

    def waited_for(self) -> bool:
        """Return whether a task waits for a time to come."""
        return any(until < math.inf for until, _ in self._waits)

    async def advance(self, seconds: float) -> None:
        """Let every task run, then time pass, and then the tasks that were due."""
        await quiet()
        self._now += seconds
        for until, due in list(self._waits):
            if until <= self._now:
                due.set()
        await quiet()


async def quiet() -> None:
    """Let every task run until it waits for something."""
    for _ in range(50):
        await asyncio.sleep(0)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine, at most 20 s."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


@dataclass
class Memory:
    """An engine's memory, and the names in front of it."""

    engine: StandInEngine
    clock: ManualClock
    events: Events
    fleet: Fleet

    @property
    def residency(self) -> Residency:
        return self.fleet.residency

    def residence(self, version: Version) -> Residence:
        return self.residency.of(version)

    def current(self, name: str) -> str | None:
        """Return the digest that a name points at."""
        alias = self.fleet.aliases.get(name)
        return alias.current.digest if alias else None

    def loaded(self) -> list[str]:
        """Return the adapters in the engine, by name."""
        return [name.partition("@")[0] for name in self.engine.loaded]

    async def answer(self, model: str, caller: str = "") -> tuple[str, float] | None:
        """Return the version that answers a request, and its value in the engine."""
        async with self.fleet.lease(model, caller) as residence:
            return None if residence is None else (residence.version.name, self.engine.loaded[residence.handle])


@dataclass
class World(Memory):
    """A server with a document, its admin API, and its policy port."""

    store: Store
    preparation: Preparation
    reconciler: Reconciler
    required: RequiredAdapters
    housekeeping: Housekeeping
    control: Control
    gateway: Gateway
    file: Path
    api: httpx.AsyncClient
    admin_app: Any
    passing: Store
    policies: Policies
    policy_app: App
    trainer: httpx.AsyncClient

    def entry(self, name: str) -> Adapter | None:
        """Return an adapter's entry of the document as it is on disk."""
        return desired.parse(self.file.read_text(), "").get(name)

    async def follow(self, text: str) -> None:
        """Replace the document by hand, and let the server read it."""
        document_text.edit(str(self.file), lambda _: text)
        await self.control.refresh()

    async def settled(self, name: str) -> Status:
        return await self.reconciler.outcome(name)

    async def enters(self, name: str, phase: str) -> Status:
        """Wait until an adapter is in a phase."""
        while self.reconciler.status[name].phase != phase:
            await self.events.change()
        return self.reconciler.status[name]

    def seen(self, name: str) -> list[str]:
        """Return the events of an adapter."""
        return [event.event for event in self.events.newest if event.adapter == name]


@asynccontextmanager
async def running(*parts: Any) -> AsyncIterator[None]:
    """Run the loops of some parts while the block runs. Raises the error of a loop that failed."""
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


@asynccontextmanager
async def memory(
    engine: StandInEngine, store: Store, base: Base, capacity: int = 2, passing: Store | None = None, **limits: float
) -> AsyncIterator[Memory]:
    """Yield a running memory of `capacity` residences."""
    engine.capacity = capacity
    clock, events = ManualClock(), Events()
    loader = Loader(engine, store, base, events, clock, passing)
    residency = Residency(loader, events, Limits(capacity, **limits), clock)
    async with running(residency):
        yield Memory(engine, clock, events, Fleet(base.name, residency, events))


@asynccontextmanager
async def server(
    engine: StandInEngine,
    store: Store,
    base: Base,
    where: Path | str,
    capacity: int = 2,
    sources: Sources | None = None,
    upload_to: UploadTarget | None = None,
    handler: App | None = None,
) -> AsyncIterator[World]:
    """Yield a running server over the document at `where`; its gateway is in front of `handler`.

    Policies are read from the folder of the document.
    """
    async with AsyncExitStack() as stack:
        passing = store.passing()
        stack.callback(passing.close)
        memory_ = await stack.enter_async_context(memory(engine, store, base, capacity, passing))
        clock, fleet = memory_.clock, memory_.fleet
        preparation = Preparation(fleet, store, clock, sources=sources)
        reconciler = Reconciler(fleet, preparation, clock, drain_s=1)
        await stack.enter_async_context(running(reconciler))
        required = RequiredAdapters(fleet, reconciler)
        control = Control(DesiredState(str(where)), fleet, store, preparation, reconciler, required, clock)
        front = gateway(fleet, handler)
        roots = (Path(where).parent,)
        proved = Preparation(fleet, passing, clock, roots, preparation.sources, urgent=True)
        policies = Policies(fleet, proved, passing, clock, most=capacity, drain_s=1)
        trainers = policy_port.build(policies, front, INFO, POLICY_TOKEN)
        trainer = httpx.AsyncClient(
            transport=httpx.ASGITransport(trainers), base_url="http://policies", auth=("x", POLICY_TOKEN)
        )
        uploads = Uploads(control, store, preparation.sources, upload_to)
        app = admin.build(control, front, TOKEN, uploads)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        api = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin", headers=headers)
        yield World(
            **vars(memory_),
            store=store,
            preparation=preparation,
            reconciler=reconciler,
            required=required,
            housekeeping=Housekeeping(fleet, store, preparation, reconciler, clock),
            control=control,
            gateway=front,
            file=Path(where),
            api=await stack.enter_async_context(api),
            admin_app=app,
            passing=passing,
            policies=policies,
            policy_app=trainers,
            trainer=await stack.enter_async_context(trainer),
        )


def gateway(fleet: Fleet, handler: App | None, subscribers: Subscribers | None = None) -> Gateway:
    """Return a gateway in front of `handler`; every POST is one to a model."""

    async def abort(_: set[str]) -> None:
        raise AssertionError("no engine works for these requests")

    return Gateway(handler, fleet, subscribers or Subscribers(), abort=abort, serves=lambda _: True)  # type: ignore[arg-type]
