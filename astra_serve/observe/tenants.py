"""The metrics of tenants, on servers with a keys document: requests, tokens and refusals by limits.

At most `MOST_TENANTS` have series of their own; the others share the label `_other`. A tenant's series end when the
document has it no longer.
"""

from collections.abc import Callable, Collection, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import Metric

from astra_serve.gateway.request import Request
from astra_serve.gateway.tenancy.caller import ALL
from astra_serve.observe.metrics import OTHER
from astra_serve.observe.sums import numbers_of

MOST_TENANTS = 1000


class TenantMetrics:
    """Counts requests by their tenants."""

    def __init__(self, registry: CollectorRegistry, exist: Callable[[], Collection[str]]) -> None:
        """`exist` returns the names of the tenants that have keys now."""
        self._exist = exist
        self._own: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"astra_tenant_{name}", text, ["tenant", *labels], registry=registry)

        outcomes = "Requests that ended; outcome: ok, client_error, server_error, cancelled"
        self._requests = counter("requests", outcomes, "outcome")
        kinds = "Tokens of requests that ended; kind: prompt, cached (of these, in the prefix cache), output"
        self._tokens = counter("tokens", kinds, "kind")
        self._limited = counter("limited", "Requests that a limit of the tenant has refused (429)")
        registry.register(self)

    def count(self, request: Request) -> None:
        """Count a request that has ended."""
        tenant, numbers = self._label(request.caller.name), numbers_of(request)
        self._requests.labels(tenant, request.outcome).inc()
        self._limited.labels(tenant).inc(numbers.limited)
        for kind, tokens in (
            ("prompt", numbers.prompt_tokens),
            ("cached", numbers.cached_tokens),
            ("output", numbers.output_tokens),
        ):
            self._tokens.labels(tenant, kind).inc(tokens)

    def collect(self) -> Iterator[Metric]:
        """End the series of tenants that are gone; there is nothing to yield."""
        for tenant in self._own - {ALL, *self._exist()}:
            self._own.discard(tenant)
            for metric in (self._requests, self._tokens, self._limited):
                metric.remove_by_labels({"tenant": tenant})
        return iter(())

    def describe(self) -> list[Metric]:
        """Return nothing: the counters are registered by themselves."""
        return []

    def _label(self, tenant: str) -> str:
        if tenant not in self._own and len(self._own) < MOST_TENANTS:
            self._own.add(tenant)
        return tenant if tenant in self._own else OTHER
