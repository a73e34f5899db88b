"""The metrics, with a stand-in for the engine; tests/e2e reads the real server's page."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from astra_serve.adapters.version import Alias, Version
from astra_serve.document.desired import Adapter
from astra_serve.gateway.request import Request
from astra_serve.observe import metrics
from astra_serve.observe.metrics import Metrics
from tests.astra_serve.world import World, in_a_loop, server


class Page:
    """The metrics of a server."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._registry = CollectorRegistry()
        gateway = world.gateway
        self.now = 0.0
        self.fault: str | None = None
        faults = {"limits_store": lambda: self.fault}
        self.metrics = Metrics(
            world.fleet,
            world.reconciler,
            gateway,
            self._registry,
            gateway.not_ready,
            faults=faults,
            now=lambda: self.now,
        )
        world.events.subscribers.append(self.metrics.note)

    async def serve(self, **sources: Path) -> None:
        for name, source in sources.items():
            self.world.reconciler.want(Adapter(name=name, source=str(source)))
        for name in sources:
            await self.world.settled(name)

    def shows(self, name: str, **labels: str) -> float | None:
        """Return the value of a series; a label that is not given is empty, as in a query."""
        wanted = {label: value for label, value in labels.items() if value}
        samples = [s for family in self._registry.collect() for s in family.samples if s.name == f"astra_{name}"]
        return next((s.value for s in samples if {k: v for k, v in s.labels.items() if v} == wanted), None)

    def adapters(self, name: str) -> set[str]:
        found = [s for family in self._registry.collect() for s in family.samples if s.name == f"astra_{name}"]
        return {sample.labels["adapter"] for sample in found}


@pytest.fixture
def page(engine, store, base, tmp_path) -> Callable[[], Any]:
    @asynccontextmanager
    async def make() -> AsyncIterator[Page]:
        async with server(engine, store, base, tmp_path / "adapters.yaml") as world:
            yield Page(world)

    return make


def request(model: str, version=None, **facts) -> Request:
    task = asyncio.current_task()
    assert task is not None
    adapter = version.alias if version else facts.pop("adapter", None)
    return Request("1", "/v1/completions", model, task, adapter, version, **{"status": 200, "complete": True, **facts})


@in_a_loop
async def test_requests_are_counted_under_the_adapter_that_served_them(page, base, write_lora) -> None:
    async with page() as p:
        await p.serve(a=write_lora("one", 1.0))
        current = p.world.fleet.aliases["a"].current
        tokens = {"prompt_tokens": 5, "output_tokens": 7, "between_tokens_s": [0.003]}
        p.metrics.first_token(request("a", current), 0.02)
        p.metrics.count(request("a", current, **tokens))
        p.metrics.count(request(current.name, current, status=500))
        p.metrics.count(request(base.name))
        p.metrics.count(request("a", adapter="a", status=503))  # known, and could not be served
        assert p.shows("requests_total", adapter="a", outcome="server_error") == 2
        for name in ("../etc", "x" * 10_000, "b"):
            p.metrics.count(request(name, status=404))
        assert p.shows("requests_total", adapter="a", outcome="ok") == 1
        assert p.shows("request_errors_total", adapter="a") == 2
        assert p.shows("prompt_tokens_total", adapter="a") == 5
        assert p.shows("output_tokens_total", adapter="a") == 7
        assert p.shows("time_to_first_token_seconds_sum", adapter="a") == pytest.approx(0.02)
        assert p.shows("inter_token_latency_seconds_sum", adapter="a") == pytest.approx(0.003)
        assert p.shows("requests_total", adapter=base.name, outcome="ok") == 1
        assert p.shows("requests_total", adapter="_unknown", outcome="client_error") == 3
        assert p.adapters("requests_total") == {"a", base.name, "_unknown"}


@in_a_loop
async def test_an_adapters_state_residency_and_proof_are_shown(page, write_lora) -> None:
    async with page() as p:
        await p.serve(a=write_lora("one", 1.0), zero=write_lora("zero", 0.0))
        await p.world.residency.look()
        current = p.world.fleet.aliases["a"].current
        assert p.shows("adapter_info", adapter="a", version=current.name, state="serving") == 1
        assert p.shows("adapter_info", adapter="zero", version="", state="failed") == 1
        assert p.shows("adapter_residency", adapter="a", where="slot") == 1
        assert p.shows("adapter_swap_seconds_count", adapter="a") == 1
        assert p.shows("adapter_load_seconds_count", adapter="a") == 1
        assert p.shows("adapter_probes_total", adapter="a", result="passed") == 1
        assert p.shows("adapter_probes_total", adapter="zero", result="failed") == 1
        assert p.shows("adapter_failures_total", adapter="zero") == 1
        assert p.shows("adapter_probe_effect_nats", adapter="a") == pytest.approx(1.0)
        assert p.shows("adapter_phase_seconds_count", phase="probing") >= 1
        assert p.shows("engine_adapters") == 1
        assert p.shows("ready") == 1
        p.world.gateway.drained = True
        assert p.shows("ready") == 0


@in_a_loop
async def test_routers_read_the_loaded_adapters_and_never_an_empty_list(page, base, write_lora) -> None:
    async with page() as p:
        room = str(p.world.residency.limits.capacity + 1)
        assert p.shows("lora_requests_info", max_lora=room, running_lora_adapters=base.name, waiting_lora_adapters="")
        await p.serve(a=write_lora("one", 1.0))
        await p.world.residency.look()
        loaded = f"{base.name},a"
        assert p.shows("lora_requests_info", max_lora=room, running_lora_adapters=loaded, waiting_lora_adapters="")


@in_a_loop
async def test_a_name_with_a_namespace_is_a_label_as_any_other(page, base, write_lora) -> None:
    async with page() as p:
        await p.serve(**{"team/a": write_lora("one", 1.0)})
        await p.world.residency.look()
        version = p.world.fleet.aliases["team/a"].current
        p.metrics.count(request("team/a", version))
        p.metrics.count(request("team/none", status=404))
        assert p.shows("requests_total", adapter="team/a", outcome="ok") == 1
        assert p.shows("adapter_info", adapter="team/a", version=version.name, state="serving") == 1
        assert p.adapters("requests_total") == {"team/a", "_unknown"}
        room, loaded = str(p.world.residency.limits.capacity + 1), f"{base.name},team/a"
        assert p.shows("lora_requests_info", max_lora=room, running_lora_adapters=loaded, waiting_lora_adapters="")
        p.world.reconciler.remove("team/a")
        await p.world.residency.idle()
        assert p.adapters("requests_total") == {"_unknown"}


@in_a_loop
async def test_there_are_never_more_series_than_for_a_thousand_adapters(page, write_lora, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "MOST_ADAPTERS", 2)
    async with page() as p:
        await p.serve(**{name: write_lora(name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))})
        for name in "abc":
            p.metrics.count(request(name, p.world.fleet.aliases[name].current))
        assert len(p.adapters("requests_total") - {"_other"}) == 2
        (shared,) = {"a", "b", "c"} - p.adapters("requests_total")
        assert p.shows("requests_total", adapter="_other", outcome="ok") == 1
        assert shared not in p.adapters("adapter_info")


@in_a_loop
async def test_the_series_of_an_adapter_end_with_it(page, write_lora) -> None:
    async with page() as p:
        await p.serve(a=write_lora("one", 1.0))
        version = p.world.fleet.aliases["a"].current
        p.metrics.count(request("a", version))
        p.world.reconciler.remove("a")
        await p.world.residency.idle()
        for name in ("requests_total", "adapter_swap_seconds_count", "adapter_info"):
            assert "a" not in p.adapters(name)
        p.metrics.count(request("a", version))  # one that ended after it
        assert "a" not in p.adapters("requests_total")


@in_a_loop
async def test_both_versions_beside_a_canary_have_series_of_their_own_until_it_has_ended(
    page, store, write_lora
) -> None:
    async with page() as p:
        await p.serve(a=write_lora("one", 1.0))
        fleet = p.world.fleet
        current, canary = fleet.aliases["a"].current, Version("a", store.add(write_lora("two", 2.0)))

        def count(*versions: Version) -> None:
            for version in versions:
                p.metrics.first_token(request("a", version), 0.02)
                p.metrics.count(request("a", version))

        def counted() -> list[float | None]:
            versions = ({}, {"version": current.name}, {"version": canary.name})
            return [p.shows("requests_total", adapter="a", outcome="ok", **version) for version in versions]

        count(current)
        fleet.point("a", Alias(current, canary=canary, weight=0.5), 1)
        count(current, canary, canary)
        assert counted() == [1, 1, 2]
        assert p.shows("time_to_first_token_seconds_count", adapter="a", version=canary.name) == 2
        p.now += 2 * metrics.VERSION_KEPT_S
        assert counted() == [1, 1, 2]
        count(canary)
        fleet.point("a", Alias(canary, (current,)), 1)
        count(canary, current)
        assert counted() == [3, None, 3]  # the last request of the canary may not have been seen yet
        p.now += 2 * metrics.VERSION_KEPT_S
        assert counted() == [3, None, None]
        assert p.shows("time_to_first_token_seconds_count", adapter="a", version=canary.name) is None


@in_a_loop
async def test_a_swap_takes_the_time_that_its_caller_waits(page, write_lora) -> None:
    """With the wait for the document's lock, and for other changes of the adapter."""
    async with page() as p:
        world, source = p.world, str(write_lora("one", 1.0))
        replace = world.control.state.replace

        async def slow(*change: Any) -> None:
            await world.clock.advance(3)
            await replace(*change)

        world.control.state.replace = slow
        before = world.clock.now()
        await world.control.publish("a", source)
        assert p.shows("adapter_swap_seconds_sum", adapter="a") == world.clock.now() - before == 3
        assert p.shows("adapter_phase_seconds_sum", phase="probing") == 0


@in_a_loop
async def test_a_store_of_limits_that_is_away_is_shown(page) -> None:
    async with page() as p:
        assert p.shows("limits_store_fault") == 0
        p.fault = "Redis is away"
        assert p.shows("limits_store_fault") == 1
