"""The metrics by tenant."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.caller import Caller
from astra_serve.observe import tenants
from astra_serve.observe.tenants import TenantMetrics


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def ended(tenant: str, **facts: Any) -> Request:
    facts = {"status": 200, "complete": True, **facts}
    return Request("1", "/v1", "a", None, caller=Caller(tenant), **facts)  # type: ignore[arg-type]


def seen(registry: CollectorRegistry) -> set[str]:
    names = {sample.labels.get("tenant") for family in registry.collect() for sample in family.samples}
    return {name for name in names if name}


def test_requests_and_tokens_are_counted_by_tenant(registry) -> None:
    metrics = TenantMetrics(registry, lambda: ["team"])
    metrics.count(ended("team", prompt_tokens=9, cached_tokens=4, output_tokens=7))
    metrics.count(ended("team", status=429))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"astra_tenant_{name}_total", {"tenant": "team", **labels})

    assert [value("requests", outcome=outcome) for outcome in ("ok", "client_error")] == [1, 1]
    assert [value("tokens", kind=kind) for kind in ("prompt", "cached", "output")] == [9, 4, 7]
    assert value("limited") == 1


def test_there_are_never_more_series_than_for_a_thousand_tenants(registry, monkeypatch) -> None:
    monkeypatch.setattr(tenants, "MOST_TENANTS", 2)
    metrics = TenantMetrics(registry, lambda: "abcd")
    for tenant in "abcd":
        metrics.count(ended(tenant))
    assert seen(registry) == {"a", "b", "_other"}


def test_the_series_of_a_tenant_end_when_the_document_has_it_no_longer(registry) -> None:
    there = {"a", "b"}
    metrics = TenantMetrics(registry, lambda: there)
    for tenant in ("a", "b", "_all"):
        metrics.count(ended(tenant))
    there.discard("a")
    seen(registry)  # its last requests are seen once more
    assert seen(registry) == {"b", "_all"}
