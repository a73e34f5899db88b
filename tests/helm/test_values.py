"""Every value has a schema, a description and a default, and wrong values are refused."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, EVERYTHING, NAMESPACE, NODES, POLICIES, TENANTS, RenderError, render, run, text_of
from tests.helm.values_table import BEGIN, SCHEMA, VALUES, resolved, table

FREE = {"global"}  # values of a parent chart


def keys(schema: dict[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every key of the schema; 0 is the first item of a list."""
    schema = resolved(schema)
    for key, inner in schema.get("properties", {}).items():
        if not path and key in FREE:
            continue
        yield (*path, key)
        yield from keys(inner, (*path, key))
    if "items" in schema:
        yield from keys(schema["items"], (*path, 0))


def with_typo(path: tuple[str | int, ...]) -> dict[str, Any]:
    """Return values with one key, the one at `path` with an additional letter."""
    *outer, last = path
    value: Any = {f"{last}x": "?"}
    for key in reversed(outer):
        value = [value] if key == 0 else {key: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("path", list(keys(SCHEMA)), ids=lambda path: ".".join(map(str, path)))
def test_a_typo_in_a_key_is_refused_by_name(path: tuple[str | int, ...]) -> None:
    with pytest.raises(RenderError, match=rf"(?i)additional propert.*'?{path[-1]}x'?"):
        render(with_typo(path))


def objects(schema: dict[str, Any], path: str = "values") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and schema of every value, groups and items of lists included."""
    schema = resolved(schema)
    yield path, schema
    for key, inner in schema.get("properties", {}).items():
        if key not in FREE:
            yield from objects(inner, f"{path}.{key}")
    if "items" in schema:
        yield from objects(schema["items"], f"{path}[]")


def groups(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key that has a default, except the amounts of resources, which are optional."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict) and key != "resources":
            yield from groups(value, (*path, key))


@pytest.mark.parametrize("path", list(groups(VALUES)), ids=".".join)
def test_a_key_without_a_value_is_refused(path: tuple[str, ...]) -> None:
    """For example `adapters:` with all entries commented out: Helm removes the key and its default."""
    values: Any = None
    for key in reversed(path):
        values = {key: values}
    with pytest.raises(RenderError, match=rf"missing propert.*'{path[-1]}'"):
        render(values)


def test_the_schema_refuses_unknown_keys_at_every_level_and_describes_every_key() -> None:
    for path, schema in objects(SCHEMA):
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path
        elif schema.get("type") == "object":  # labels and annotations
            assert schema["additionalProperties"] == {"type": "string"}, path
        if path != "values" and not path.endswith("[]"):
            assert schema.get("description"), path


def test_every_value_has_a_default_and_every_default_is_in_the_schema() -> None:
    def compare(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        known = {key: resolved(inner) for key, inner in schema["properties"].items()}
        if not path.endswith(("resources.requests.", "resources.limits.")):  # their amounts are optional
            assert set(values) == set(known) - FREE, path
        for key, value in values.items():
            if isinstance(value, dict) and value and "properties" in known[key]:
                compare(known[key], value, f"{path}{key}.")

    compare(SCHEMA, VALUES, "")


def test_the_table_of_values_in_the_readme_is_up_to_date() -> None:
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    assert BEGIN + table() in readme, "run: python -m tests.helm.values_table"


ADAPTER = {"name": "a", "source": "hf://o/r"}
CLAIM = {"claim": {"name": "c"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"adapters": [{**ADAPTER, "rank": 128}]}, '"a" has rank 128, above engine.maxLoraRank, which is 64'),
    "a name twice": ({"adapters": [ADAPTER, ADAPTER]}, 'two adapters are named "a"'),
    "the base's name": (
        {"adapters": [{**ADAPTER, "name": "llama"}], "base": {"source": "s3://b/llama"}},
        'adapter "llama" has the base\'s name',
    ),
    "the base's name, hub": (
        {"adapters": [{**ADAPTER, "name": "Qwen/Qwen3-0.6B"}], "base": {"source": "Qwen/Qwen3-0.6B"}},
        'adapter "Qwen/Qwen3-0.6B" has the base\'s name',
    ),
    "pinned canaries": (
        {
            "adapters": [
                {**ADAPTER, "name": f"a{i}", "pin": True, "canary": {"version": "hf://o/r2", "weight": 0.5}}
                for i in range(5)
            ]
        },
        "10 versions are pinned, canaries included, but engine.maxLoras is 8",
    ),
    "pinned": ({"adapters": [{**ADAPTER, "name": f"a{i}", "pin": True} for i in range(9)]}, "9 versions are pinned"),
    "slots": ({"engine": {"maxLoras": 9, "resident": 8}}, "resident adapters include those of a batch"),
    "store, replicas": ({"replicas": 2, "store": CLAIM}, "store.claim is ReadWriteOnce, but there may be 2 pods"),
    "store, scaled": ({"autoscaling": {"kind": "hpa"}, "store": CLAIM}, "there may be 4 pods"),
    "adapters claim": (
        {"replicas": 2, "adaptersClaim": {"name": "c", "accessMode": "ReadWriteOnce"}},
        "adaptersClaim is ReadWriteOnce",
    ),
    "empty store": (
        {"adapters": [{"name": "a", "source": "sha256:" + "0" * 64}]},
        "has a source in the store",
    ),
    "a store of each server": (
        {
            "adapters": [{"name": "a", "source": "sha256:" + "0" * 64}],
            "replicas": 2,
            "store": {"claim": {"name": "c", "accessMode": "ReadWriteMany"}},
        },
        "each server has its own",
    ),
    "hub id": ({"adapters": [{"name": "a", "source": "org/repo"}]}, "for a hub id write hf://org/repo"),
    "base, hub": ({"base": {"source": "hf://org/gated"}}, "write a base of the hub as ORG/NAME"),
    "token in a step's source": (
        {"adapters": [{**ADAPTER, "previous": [{"digest": f"sha256:{'0' * 64}", "source": "https://h/a?token=x"}]}]},
        "a URL contains credentials",
    ),
    "token in a query": ({"adaptersUrl": "https://host/a.yaml?x=1&sig=abc"}, "a URL contains credentials"),
    "OpenAI's key": ({"env": [{"name": "OPENAI_KEY", "value": "sk"}]}, "env has the secret OPENAI_KEY as plain text"),
    "value twice": (
        {"env": [{"name": "A", "value": "1", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]},
        "env has A with value and valueFrom",
    ),
    "volume": ({"volumes": [{"name": "a", "mountPath": "/a"}]}, "must be one of secret, configMap and claim"),
    "a volume twice": (
        {"volumes": [{"name": "a", "mountPath": "/a", "secret": "s"}, {"name": "a", "mountPath": "/b", "claim": "c"}]},
        'two volumes are named "a"',
    ),
    "rules": ({"monitoring": {"rules": True}}, "set monitoring.serviceMonitor, too"),
    "load balancer": ({"service": {"type": "LoadBalancer"}}, "reachable from outside without a key"),
    "canary's folder": (
        {"adapters": [{**ADAPTER, "canary": {"version": "/tmp/x", "weight": 0.5}}]},  # noqa: S108
        "set adaptersClaim.name",
    ),
    "store, read-only": (
        {"store": {"claim": {"name": "c", "accessMode": "ReadOnlyMany"}}},
        "the server writes into it",
    ),
    "base claim": (
        {"replicas": 2, "base": {"source": "/base", "claim": {"name": "c", "accessMode": "ReadWriteOnce"}}},
        "base.claim is ReadWriteOnce",
    ),
    "canary": (
        {"adapters": [{**ADAPTER, "canary": {"version": "hf://o/r2", "weight": 1}}]},
        "the canary's weight is 1: it must be above 0 and below 1",
    ),
    "no canary": (
        {"adapters": [{**ADAPTER, "canary": {"version": "hf://o/r2", "weight": 0}}]},
        "the canary's weight is 0: it must be above 0 and below 1",
    ),
    "two documents": ({"adapters": [ADAPTER], "adaptersUrl": "s3://b/k"}, "give the desired state in one of them"),
    "two places": ({"adapters": [ADAPTER], "adaptersFile": "/adapters/a.yaml"}, "give the desired state in one of"),
    "file and URL": ({"adaptersFile": "/adapters/a.yaml", "adaptersUrl": "s3://b/k"}, "give the desired state in one"),
    "file, no claim": ({"adaptersFile": "/adapters/a.yaml"}, "set adaptersClaim.name"),
    "file, read-only claim": (
        {"adaptersFile": "/adapters/a.yaml", "adaptersClaim": {"name": "c"}},
        "with an accessMode other than ReadOnlyMany",
    ),
    "uploads, no file": ({"uploadTo": "s3://b/k", "admin": {"secret": "a"}}, "set admin.secret and adaptersFile"),
    "uploads, no admin": ({**TENANTS, "admin": {"secret": ""}}, "set admin.secret and adaptersFile"),
    "token in the uploads": ({**TENANTS, "uploadTo": "s3://key:secret@b/k"}, "a URL contains credentials"),
    "token in the keys' URL": ({"tenants": {"keys": "https://h/keys?token=x"}}, "a URL contains credentials"),
    "policies, no folder": ({"policies": {"secret": "p"}}, "set adaptersClaim.name"),
    "policies, replicas": ({**POLICIES, "replicas": 2}, "there may be 2 replicas"),
    "policies, scaled": ({**POLICIES, "autoscaling": {"kind": "hpa"}}, "there may be 4 replicas"),
    "policies, port": ({"policies": {"port": 8000}}, "policies.port is 8000"),
    "policies, admin's port": (
        {**POLICIES, "policies": {"secret": "p", "port": 8001}, "admin": {"secret": "a"}},
        "policies.port and admin.port are both 8001",
    ),
    "limits without keys": ({"tenants": {"limitsStore": {"secret": "r"}}}, "set tenants.keys"),
    "metrics without a key": (
        {"tenants": {"keys": "k"}, "apiKey": {"secret": "a"}, "monitoring": {"serviceMonitor": True}},
        "set monitoring.apiKey.secret to a Secret with its key",
    ),
    "keys and picker": (
        {"tenants": {"keys": "k"}, "inferencePool": {"enabled": True}},
        "which the endpoint picker cannot send",
    ),
    "keys as an option": ({"engine": {"args": ["--keys=/x"]}}, "use tenants.keys"),
    "limits' URL as an option": ({"engine": {"args": ["--limits-store=redis://x"]}}, "use tenants.limitsStore"),
    "no folder": ({"adapters": [{"name": "a", "source": "/adapters/a"}]}, "set adaptersClaim.name"),
    "other folder": (
        {"adapters": [{"name": "a", "source": "/tmp/a"}], "adaptersClaim": {"name": "c"}},  # noqa: S108
        "adaptersClaim is mounted at /adapters",
    ),
    "1 MB": ({"adapters": [{"name": f"a{i}", "source": "hf://o/" + "r" * 500} for i in range(2000)]}, "1 MB"),
    "no rollout": ({"rollout": {"maxSurge": 0, "maxUnavailable": 0}}, "no pod could be replaced"),
    "nodes, store": ({**NODES, "store": {"claim": {"name": ""}}}, "set store.claim with ReadWriteMany"),
    "nodes, no GPU": ({**NODES, "gpu": {"count": 0}}, "gpu.count is 0"),
    "base, no claim": ({"base": {"source": "/base"}}, "set base.claim.name"),
    "base, elsewhere": ({"base": {"source": "o/r", "claim": {"name": "c"}}}, "set base.source to a folder below /base"),
    "scale": ({"autoscaling": {"kind": "keda", "minReplicas": 5}}, "minReplicas is above"),
    "ingress": ({"ingress": {"enabled": True}}, "ingress.enabled needs ingress.host"),
    "route": ({"httpRoute": {"enabled": True}}, "name the Gateway"),
    "one Gateway, two ports": (
        {"httpRoute": {"parentRefs": [{"name": "g", "port": 80}, {"name": "g", "namespace": NAMESPACE, "port": 443}]}},
        '"g" twice: give each a different sectionName',
    ),
    "one listener twice": (
        {"httpRoute": {"parentRefs": [{"name": "g", "sectionName": "a"}, {"name": "g", "sectionName": "a"}]}},
        '"g" twice',
    ),
    "secret": ({"env": [{"name": "HF_TOKEN", "value": "hf_x"}]}, "env has the secret HF_TOKEN as plain text"),
    "variable of the chart": (
        {"env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]},
        "env has HF_TOKEN, which the chart sets: use hubToken",
    ),
    "variable twice": ({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "env has A twice"),
    "admin": ({"admin": {"port": 8000}}, "admin.port is 8000"),
    "key": ({"engine": {"args": ["--api_key=x"]}}, "use apiKey.secret"),
    "short option": (
        {"engine": {"args": ["-tp=2"]}},
        "engine.args has -tp, which the chart sets: use gpu.count",
    ),
    "hub token": ({"engine": {"args": ["--hf-token", "hf_x"]}}, "use hubToken"),
    "TLS": ({"engine": {"args": ["--ssl-keyfile=/x"]}}, "use ingress.tlsSecret"),
    "option": ({"engine": {"args": ["--port=9000"]}}, "--port, which the chart sets: use service.port"),
    "password": ({"adaptersUrl": "https://user:secret@host/document"}, "a URL contains credentials"),
    "no metrics": ({"autoscaling": {"kind": "keda"}}, "set monitoring.serviceMonitor"),
    "no key": ({"ingress": {"enabled": True, "host": "a.b"}}, "reachable from outside without a key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_work_are_refused_with_a_reason(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(RenderError, match=re.escape(message)):
        render(values)


@pytest.mark.parametrize(
    "values",
    [{"tenants": {"keys": "Not_A_Secret"}}, {"tenants": {"keys": "/etc/keys.yaml"}}, {"uploadTo": "/elsewhere"},
     {"adaptersFile": "adapters.yaml"}, {"policies": {"port": 80}}, {"tenants": {"limitsStore": {"port": 0}}},
     {"replicas": -1}, {"image": {"pullPolicy": "Sometimes"}}, {"engine": {"maxLoraRank": 48}}, {"drainSeconds": 0},
     {"adapters": [{"name": "../a", "source": "s"}]}, {"adapters": [{"name": "a/b/c", "source": "s"}]},
     {"adapters": [{"name": "a"}]}, {"shm": "8 gigabytes"},
     {"adapters": [{**ADAPTER, "previous": ["sha256:1"]}]}, {"adapters": [{**ADAPTER, "previous": [{"source": "s"}]}]},
     {"adapters": [{**ADAPTER, "previous": [{"digest": f"sha256:{'1' * 64}", "replaced": "yesterday"}]}]},
     {"adapters": [{**ADAPTER, "canary": {"version": "s", "weight": 0.5, "digest": "sha256:1"}}]},
     {"nameOverride": "bad name"}, {"fullnameOverride": "1a"}, {"service": {"port": 65536}}, {"admin": {"port": 80}},
     {"httpRoute": {"hostnames": ["a_b..c"]}}, {"httpRoute": {"parentRefs": [{"name": "g", "namespace": "Bad_NS"}]}}],
)  # fmt: skip
def test_a_value_of_a_wrong_type_or_format_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RenderError, match="values don't meet the specifications of the schema"):
        render(values)


def test_a_route_may_use_several_listeners_of_one_gateway() -> None:
    listeners = [{"name": "g", "sectionName": "http"}, {"name": "g", "sectionName": "https"}, {"name": "h"}]
    assert render({"httpRoute": {"enabled": True, "parentRefs": listeners}, "apiKey": {"secret": "k"}})


def test_a_name_that_is_invalid_for_a_service_is_refused() -> None:
    for name in ("1a", "a.b", "1"):
        with pytest.raises(RenderError, match=f'"{name}-astra" is not a valid name of a Service: set fullname'):
            run("helm4", "template", name, str(CHART))
        assert run("helm4", "template", name, str(CHART), "--set", "fullnameOverride=a")
    with pytest.raises(RenderError, match='"on" is not a valid name of a Service'):
        render({"fullnameOverride": "on"})


def test_a_shortened_name_does_not_end_with_a_dash() -> None:
    objects = yaml.safe_load_all(run("helm4", "template", "a" * 38 + "--b", str(CHART)))
    assert {o["metadata"]["name"] for o in objects if o and o["kind"] == "Deployment"} == {"a" * 38}


@pytest.mark.parametrize("values", [{"fullnameOverride": "a" * 40}, {"nameOverride": "a" * 40}])
def test_labels_made_of_the_longest_name_are_valid(values: dict[str, Any]) -> None:
    """The longest label is of a group's pods: their StatefulSet, GROUP-INDEX, and a hash of ten characters."""
    (group,) = (o for o in render({**NODES, **values}) if o["kind"] == "LeaderWorkerSet")
    assert len(f"{group['metadata']['name']}-9999-{'h' * 10}") <= 63


def whole_numbers(schema: dict[str, Any]) -> dict[str, Any]:
    """Return values with a large number, or the maximum, for every integer of the schema."""
    found: dict[str, Any] = {}
    for key, inner in resolved(schema).get("properties", {}).items():
        if inner.get("type") == "integer":
            found[key] = min(2_000_000, inner.get("maximum", 2_000_000))
        elif deeper := whole_numbers(inner):
            found[key] = deeper
    return found


@pytest.mark.parametrize("nodes", [1, 2_000_000])
def test_large_integers_are_rendered_without_an_exponent(nodes: int) -> None:
    """Helm reads numbers as floating point; the user ids of OpenShift are large."""
    large = whole_numbers(SCHEMA)
    assert large["podSecurity"]["user"] == 2_000_000
    for kind in ("keda", "hpa"):
        scaled = {**large["autoscaling"], "kind": kind}
        sizes = {"base": {"size": 2**40}, "store": {**EVERYTHING["store"], "size": 2**40}, "shm": 2**33}
        values = {**EVERYTHING, **large, **sizes, "nodes": nodes, "autoscaling": scaled}
        values["inferencePool"] = {"enabled": True, **large["inferencePool"]}
        text = text_of(values)
        assert "2000000" in text
        assert not re.search(r"\d[eE]\+?\d\d", re.sub(r"[0-9a-f]{64}", "", text))


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "AWS_WEB_IDENTITY_TOKEN_FILE", "VLLM_MAX_TOKENS"])
def test_a_variable_with_token_in_its_name_need_not_be_a_secret(name: str) -> None:
    assert render({"env": [{"name": name, "value": "1"}]})


def test_the_value_of_an_engine_option_is_not_read_as_an_option() -> None:
    assert render({"engine": {"args": ["--served-by", "base", "--seed", "n"]}})


def test_resources_accept_other_devices() -> None:
    assert render({"resources": {"limits": {"rdma/ib": 1, "hugepages-2Mi": "1Gi"}}})
