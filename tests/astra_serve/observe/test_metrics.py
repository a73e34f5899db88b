"""What Prometheus is told, with a stand-in for the engine; tests/e2e reads the real server's page."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from astra_serve.adapters.fleet import Fleet
from astra_serve.control.reconcile import Reconciler
from astra_serve.document.desired import Adapter, Document
from astra_serve.gateway.middleware import Gateway
from astra_serve.gateway.request import Request
from astra_serve.observe import metrics
from astra_serve.observe.metrics import Metrics
from tests.astra_serve.adapters.test_fleet import in_a_loop


class Page:
    """A fleet with its metrics, and what they say."""

    def __init__(self, engine, store, base) -> None:
        self.fleet = Fleet(engine, store, base, 2)
        self.reconciler, self.gateway = Reconciler(self.fleet, store, drain_s=1), Gateway(self.fleet)
        self._registry = CollectorRegistry()
        self.metrics = Metrics(self.fleet, self.reconciler, self.gateway, self._registry, self.gateway.not_ready)
        self.fleet.journal.readers.append(self.metrics.note)

    async def serve(self, **sources: Path) -> None:
        entries = [Adapter(name=name, source=str(source)) for name, source in sources.items()]
        self.reconciler.apply(Document(adapters=entries))
        for name in sources:
            await self.reconciler.settled(name)

    def says(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"astra_{name}", labels)

    def adapters(self, name: str) -> set[str]:
        found = [s for family in self._registry.collect() for s in family.samples if s.name == f"astra_{name}"]
        return {sample.labels["adapter"] for sample in found}


@pytest.fixture
def page(engine, store, base) -> Callable[[], Page]:
    return lambda: Page(engine, store, base)


def request(model: str, version=None, **what) -> Request:
    task = asyncio.current_task()
    assert task is not None
    adapter = version.alias if version else what.pop("adapter", None)
    return Request("1", "/v1/completions", model, task, adapter, version, **{"status": 200, "complete": True, **what})


@in_a_loop
async def test_requests_are_counted_under_the_adapter_that_served_them(page, base, write_lora) -> None:
    p = page()
    await p.serve(a=write_lora("one", 1.0))
    current = p.fleet.aliases["a"].current
    tokens = {"prompt_tokens": 5, "output_tokens": 7, "between_tokens_s": [0.003]}
    p.metrics.first_token(request("a", current), 0.02)
    p.metrics.count(request("a", current, **tokens))
    p.metrics.count(request(current.name, current, status=500))
    p.metrics.count(request(base.name))
    p.metrics.count(request("a", adapter="a", status=503))  # known, and could not be served
    assert p.says("requests_total", adapter="a", outcome="server_error") == 2
    for name in ("../etc", "x" * 10_000, "b"):
        p.metrics.count(request(name, status=404))
    assert p.says("requests_total", adapter="a", outcome="ok") == 1
    assert p.says("request_errors_total", adapter="a") == 2
    assert p.says("prompt_tokens_total", adapter="a") == 5
    assert p.says("output_tokens_total", adapter="a") == 7
    assert p.says("time_to_first_token_seconds_sum", adapter="a") == pytest.approx(0.02)
    assert p.says("inter_token_latency_seconds_sum", adapter="a") == pytest.approx(0.003)
    assert p.says("requests_total", adapter=base.name, outcome="ok") == 1
    assert p.says("requests_total", adapter="_unknown", outcome="client_error") == 3
    assert p.adapters("requests_total") == {"a", base.name, "_unknown"}


@in_a_loop
async def test_what_an_adapter_is_and_how_it_came_to_be_is_told(page, write_lora) -> None:
    p = page()
    await p.serve(a=write_lora("one", 1.0), zero=write_lora("zero", 0.0))
    await p.fleet.places.look()
    current = p.fleet.aliases["a"].current
    assert p.says("adapter_info", adapter="a", version=current.name, state="serving") == 1
    assert p.says("adapter_info", adapter="zero", version="", state="failed") == 1
    assert p.says("adapter_residency", adapter="a", where="slot") == 1
    assert p.says("adapter_swap_seconds_count", adapter="a") == 1
    assert p.says("adapter_load_seconds_count", adapter="a") == 1
    assert p.says("adapter_probes_total", adapter="a", result="passed") == 1
    assert p.says("adapter_probes_total", adapter="zero", result="failed") == 1
    assert p.says("adapter_failures_total", adapter="zero") == 1
    assert p.says("adapter_probe_effect_nats", adapter="a") == pytest.approx(1.0)
    assert p.says("adapter_phase_seconds_count", phase="probing") >= 1
    assert p.says("engine_adapters") == 1
    assert p.says("ready") == 1
    p.gateway.drained = True
    assert p.says("ready") == 0


@in_a_loop
async def test_routers_are_told_what_is_loaded_and_never_an_empty_list(page, base, write_lora) -> None:
    p = page()
    room = str(p.fleet.places.capacity + 1)
    assert p.says("lora_requests_info", max_lora=room, running_lora_adapters=base.name, waiting_lora_adapters="")
    await p.serve(a=write_lora("one", 1.0))
    await p.fleet.places.look()
    loaded = f"{base.name},a"
    assert p.says("lora_requests_info", max_lora=room, running_lora_adapters=loaded, waiting_lora_adapters="")


@in_a_loop
async def test_there_are_never_more_series_than_for_a_thousand_adapters(page, write_lora, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "MOST_ADAPTERS", 2)
    p = page()
    await p.serve(**{name: write_lora(name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))})
    for name in "abc":
        p.metrics.count(request(name, p.fleet.aliases[name].current))
    assert len(p.adapters("requests_total") - {"_other"}) == 2
    (shared,) = {"a", "b", "c"} - p.adapters("requests_total")
    assert p.says("requests_total", adapter="_other", outcome="ok") == 1
    assert shared not in p.adapters("adapter_info")


@in_a_loop
async def test_the_series_of_an_adapter_end_with_it(page, write_lora) -> None:
    p = page()
    await p.serve(a=write_lora("one", 1.0))
    version = p.fleet.aliases["a"].current
    p.metrics.count(request("a", version))
    p.reconciler.remove("a")
    await p.fleet.drained()
    for name in ("requests_total", "adapter_swap_seconds_count", "adapter_info"):
        assert "a" not in p.adapters(name)
    p.metrics.count(request("a", version))  # one that ended after it
    assert "a" not in p.adapters("requests_total")
