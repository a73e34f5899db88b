"""The metrics `astra_*`, by adapter, on the same page as vLLM's own.

At most `MOST_ADAPTERS` adapters have series of their own; the others share the label `_other`. An adapter's series end
when it is removed. Requests for unknown names are counted under `_unknown`.

The metrics of requests have a label `version`, which is empty except beside a canary: then both versions have series
of their own. The sum over `version` is always the adapter's; the series of a version end `VERSION_KEPT_S` after its
last request, when the canary has ended.
"""

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from astra_serve.adapters.events import Event
from astra_serve.adapters.fleet import Fleet
from astra_serve.control.control import Control
from astra_serve.control.reconcile import Reconciler
from astra_serve.gateway.middleware import Gateway
from astra_serve.gateway.request import Request

Label = tuple[str, str]  # an adapter, and a version beside a canary
Sample = tuple[list[str], float]  # the values of the labels, and the number
MOST_ADAPTERS = 1000
VERSION_KEPT_S = 600.0  # several scrapes: the last requests are seen
FAULTS = {
    "keys": "1 while the keys document as it is now is not followed",
    "limits_store": "1 while Redis is away, and each server counts limits for itself",
}
OTHER, UNKNOWN = "_other", "_unknown"  # no adapter can be called so
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
CHANGE_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts requests and events, and reads everything else when the page is asked for."""

    def __init__(
        self,
        fleet: Fleet,
        reconciler: Reconciler,
        gateway: Gateway,
        registry: CollectorRegistry,
        not_ready: Callable[[], list[str]],
        control: Control | None = None,
        faults: Mapping[str, Callable[[], str | None]] = MappingProxyType({}),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`not_ready` returns the reasons of /readyz; `control` follows the document, if it may change.

        `faults` returns why a part of the server, by its name, does not work as it should; None where it does.
        """
        self._faults = dict(faults)
        self._fleet, self._reconciler, self._gateway, self._control = fleet, reconciler, gateway, control
        self._not_ready, self._now = not_ready, now
        self._own: set[str] = set()  # adapters with series of their own
        self._by_adapter: list[MetricWrapperBase] = []
        self._last_request: dict[Label, float] = {}  # of each version with series of its own

        def counter(name: str, text: str, *labels: str) -> Counter:
            found = Counter(name, text, ["adapter", *labels], registry=registry)
            self._by_adapter.append(found)
            return found

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            found = Histogram(name, text, ["adapter", *labels], buckets=buckets, registry=registry)
            self._by_adapter.append(found)
            return found

        self._requests = counter(
            "astra_requests",
            "Requests that ended; outcome: ok, client_error, server_error, cancelled",
            "version",
            "outcome",
        )
        self._errors = counter(
            "astra_request_errors", "Requests that ended with a 4xx, a 5xx, or a broken stream", "version"
        )
        self._prompt = counter("astra_prompt_tokens", "Tokens of prompts", "version")
        self._output = counter("astra_output_tokens", "Generated tokens", "version")
        self._first = histogram(
            "astra_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            FIRST_TOKEN_S,
            "version",
        )
        self._between = histogram(
            "astra_inter_token_latency_seconds", "Between two tokens, an answer's mean", BETWEEN_TOKENS_S, "version"
        )
        self._swaps = histogram(
            "astra_adapter_swap_seconds",
            "From the call, or the read, of a change to the flip of the alias",
            CHANGE_S,
        )
        self._by_version = list(self._by_adapter[:6])
        self._loads = histogram(
            "astra_adapter_load_seconds", "Reading a version into the engine, and proving it there", CHANGE_S
        )
        self._probes = counter("astra_adapter_probes", "Probes of versions on the engine: passed, failed", "result")
        self._failures = counter("astra_adapter_failures", "Versions that could not be served, or not any more")
        self._phases = Histogram(
            "astra_adapter_phase_seconds", "The parts of a swap", ["phase"], buckets=CHANGE_S, registry=registry
        )
        registry.register(self)

    def count(self, request: Request) -> None:
        """Count a request that has ended."""
        label = self._with_version(request)
        self._requests.labels(*label, request.outcome).inc()
        if request.outcome in ("client_error", "server_error"):
            self._errors.labels(*label).inc()
        self._prompt.labels(*label).inc(request.prompt_tokens)
        self._output.labels(*label).inc(request.output_tokens)
        for seconds in request.between_tokens_s:
            self._between.labels(*label).observe(seconds)

    def first_token(self, request: Request, seconds: float) -> None:
        """Count a first token when it is computed: an autoscaler need not wait for the end of long streams."""
        self._first.labels(*self._with_version(request)).observe(seconds)

    def note(self, event: Event) -> None:
        """Count an event of an adapter."""
        if not event.adapter:
            return
        if event.event == "removed":
            self._end(event.adapter)
            return
        adapter = self._label(event.adapter)
        if event.event == "loaded":
            self._loads.labels(adapter).observe(sum(event.seconds.values()))
            if "probing" in event.seconds:
                self._probes.labels(adapter, "passed").inc()
        elif event.event == "probe_failed":
            self._probes.labels(adapter, "failed").inc()
        elif event.event == "serving":
            self._swaps.labels(adapter).observe(event.total or 0.0)
            for phase, seconds in event.seconds.items():
                self._phases.labels(str(phase)).observe(seconds)
        elif event.event == "failed":
            self._failures.labels(adapter).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, as they are at this moment."""
        self._end_versions()
        running = Counts(self._of(request) for request in list(self._gateway.running))
        by_adapter = [([label], number) for label, number in running.items()]
        yield _gauge("requests_running", "Requests that have not ended", by_adapter, "adapter")
        waiting = sum(request.waits for request in list(self._gateway.running))
        yield _gauge("requests_waiting", "Requests that wait for a place in the engine, with --keys", [([], waiting)])
        yield from self._of_adapters()
        residency, fault = self._fleet.residency, bool(self._control and self._control.state.fault)
        for name, text, value in (
            ("engine_adapters", "Adapters in the engine's memory", len(residency.loaded())),
            ("engine_adapters_max", "Adapters that the engine's memory has room for", residency.limits.capacity),
            ("ready", "1 when /readyz says yes", not self._not_ready()),
            ("document_fault", "1 while the document as it is now is not followed", fault),
        ):
            yield _gauge(name, text, [([], value)])
        for name, fault_of in self._faults.items():
            yield _gauge(f"{name}_fault", FAULTS[name], [([], fault_of() is not None)])
        yield self._for_routers()

    def describe(self) -> list[Metric]:
        """Return nothing: the gauges depend on the moment."""
        return []

    def _of_adapters(self) -> Iterator[Metric]:
        residency, info, where, effect, deviation = self._fleet.residency, *(list[Sample]() for _ in range(4))
        for name, status in list(self._reconciler.status.items()):
            alias = self._fleet.aliases.get(name)
            if self._label(name) == OTHER:
                continue
            info.append(([name, alias.current.name if alias else "", str(status.phase)], 1))
            if alias is None:
                continue
            where.append(([name, residency.where(alias.current)], 1))
            if proof := residency.of(alias.current).proof:
                effect.append(([name], proof.verdict.effect))
                if proof.verdict.deviation is not None:
                    deviation.append(([name], proof.verdict.deviation))
        yield _gauge("adapter_info", "Version and state of an adapter", info, "adapter", "version", "state")
        yield _gauge("adapter_residency", "Where the version that serves is", where, "adapter", "where")
        yield _gauge("adapter_probe_effect_nats", "From the base, by the last probe", effect, "adapter")
        yield _gauge("adapter_probe_deviation_nats", "From the record, by the last probe", deviation, "adapter")

    def _for_routers(self) -> Metric:
        """Return the metric that LoRA-aware routers read, with the names of requests: vLLM's own has version names.

        The base is listed, too: Gateway API's endpoint picker ignores an empty list, and would keep the one before.
        """
        residency, text = self._fleet.residency, "The base and adapters in the engine's memory; since 1970"
        loaded = [name for name, alias in self._fleet.aliases.items() if residency.of(alias.current).loaded]
        values = [str(residency.limits.capacity + 1), ",".join([self._fleet.base_name, *loaded]), ""]
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        return _gauge("lora_requests_info", text, [(values, time.time())], *labels)

    def _of(self, request: Request) -> str:
        if request.adapter is not None:
            return self._label(request.adapter)
        return request.model if request.model == self._fleet.base_name else UNKNOWN

    def _with_version(self, request: Request) -> Label:
        adapter, version = self._of(request), request.version
        if version is None or adapter == OTHER or not self._beside_a_canary(version.alias, version.name):
            return adapter, ""
        self._last_request[adapter, version.name] = self._now()
        return adapter, version.name

    def _beside_a_canary(self, adapter: str, version: str) -> bool:
        alias = self._fleet.aliases.get(adapter)
        return alias is not None and alias.canary is not None and version in {one.name for one in alias.serving()}

    def _end_versions(self) -> None:
        """End the series of versions whose canary has ended, once their last requests have been seen."""
        for (adapter, version), when in list(self._last_request.items()):
            if when + VERSION_KEPT_S < self._now() and not self._beside_a_canary(adapter, version):
                del self._last_request[adapter, version]
                for metric in self._by_version:
                    metric.remove_by_labels({"adapter": adapter, "version": version})

    def _label(self, adapter: str) -> str:
        if adapter not in self._own and adapter in self._reconciler.status and len(self._own) < MOST_ADAPTERS:
            self._own.add(adapter)
        return adapter if adapter in self._own else OTHER

    def _end(self, adapter: str) -> None:
        if adapter in self._own:
            self._own.discard(adapter)
            self._last_request = {label: when for label, when in self._last_request.items() if label[0] != adapter}
            for metric in self._by_adapter:
                metric.remove_by_labels({"adapter": adapter})


def _gauge(name: str, text: str, samples: Iterable[Sample], *labels: str) -> Metric:
    found = GaugeMetricFamily(f"astra_{name}", text, labels=labels)
    for values, number in samples:
        found.add_metric(values, float(number))
    return found
