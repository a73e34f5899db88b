"""Tenants in the chart: keys, the store of limits, metrics behind a key, and the ports and folders beside them."""

import json
import re
from typing import Any

import pytest

from astra_serve import start
from astra_serve.document import keys
from tests.helm.chart import CHART, EVERYTHING, NODES, POLICIES, TENANTS, container, one, pod, render
from tests.helm.test_rules import args, ports

KEYS: dict[str, Any] = {"tenants": {"keys": "tenants"}}


def mounts(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the mounts of the server's container by the names of their volumes."""
    return {mount["name"]: mount for mount in container(objects)["volumeMounts"]}


def variables(found: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of a container that are keys of Secrets: name and key of the Secret."""
    references = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef") for each in found.get("env", [])}
    return {name: reference for name, reference in references.items() if reference}


def roles(objects: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the pods of a group's leader and of its workers."""
    group = one(objects, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    return group["leaderTemplate"]["spec"], group["workerTemplate"]["spec"]


# Keys


def test_the_keys_document_is_mounted_as_a_folder_which_kubernetes_updates() -> None:
    objects = render(KEYS)
    mount = mounts(objects)["keys"]
    assert mount == {"name": "keys", "mountPath": "/etc/astra-keys", "readOnly": True}
    assert args(objects)["keys"] == "/etc/astra-keys/keys.yaml"
    assert {"name": "keys", "secret": {"secretName": "tenants"}} in pod(objects)["spec"]["volumes"]


def test_the_server_can_read_the_keys_document_of_the_readme() -> None:
    blocks = re.findall(r"```yaml\n(tenants:.*?)```", (CHART / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (keys.parse(block, "the README") for block in blocks)
    assert [tenant.name for tenant in found.tenants if tenant.metrics] == ["prometheus"]


def test_a_keys_document_at_a_url_has_no_volume() -> None:
    objects = render({"tenants": {"keys": "s3://keys/keys.yaml"}})
    assert args(objects)["keys"] == "s3://keys/keys.yaml"
    assert "keys" not in mounts(objects)


def test_the_server_reads_the_options_of_tenants_uploads_and_policies() -> None:
    found, _ = start._parser().parse_known_args(container(render(TENANTS))["args"])
    assert (found.keys, found.upload_to) == ("/etc/astra-keys/keys.yaml", "/adapters/uploads")
    found, _ = start._parser().parse_known_args(container(render(POLICIES))["args"])
    assert (found.policy_host, found.policy_port) == ("0.0.0.0", 8002)  # noqa: S104 (in the pod)


def test_without_tenants_the_server_has_no_option_of_theirs() -> None:
    objects = render(EVERYTHING)
    assert not {"keys", "limits-store"} & set(args(objects))
    assert "ASTRA_LIMITS_STORE" not in variables(container(objects))


def test_tenants_and_an_api_key_work_beside_each_other() -> None:
    objects = render({**KEYS, "apiKey": {"secret": "k"}})
    assert variables(container(objects))["VLLM_API_KEY"] == {"name": "k", "key": "api-key"}
    assert "keys" in args(objects)


def test_keys_of_tenants_allow_routes_from_outside() -> None:
    route = {"ingress": {"enabled": True, "host": "a.b"}}
    assert one(render({**KEYS, **route}), "Ingress")


def test_the_worker_of_a_group_has_no_keys_and_no_tokens() -> None:
    values = {**NODES, "tenants": TENANTS["tenants"], "replicas": 1, "policies": {"secret": "p"}}
    leader, worker = roles(render({**values, "adaptersClaim": {"name": "c"}, "admin": {"secret": "a"}}))
    secrets = {"ASTRA_ADMIN_TOKEN", "ASTRA_POLICY_TOKEN", "ASTRA_LIMITS_STORE"}
    assert set(variables(leader["containers"][0])) == secrets
    assert not variables(worker["containers"][0])
    assert "keys" in {volume["name"] for volume in leader["volumes"]}
    assert "keys" not in {volume["name"] for volume in worker["volumes"]}


# Limits


def test_the_url_of_the_store_of_limits_is_from_a_secret_and_no_argument() -> None:
    objects = render(TENANTS)
    assert variables(container(objects))["ASTRA_LIMITS_STORE"] == {"name": "limits", "key": "url"}
    assert "limits-store" not in args(objects)


def egress(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules for connections of the server to others."""
    found: list[dict[str, Any]] = one(objects, "NetworkPolicy")["spec"]["egress"]
    return found


def test_the_network_policy_opens_the_store_of_limits_to_the_server() -> None:
    rule = {"to": TENANTS["networkPolicy"]["limitsStoreTo"], "ports": [{"port": 6379, "protocol": "TCP"}]}
    assert rule in egress(render(TENANTS))
    store = {"secret": "r", "port": 6380}
    elsewhere = render({"tenants": {"keys": "k", "limitsStore": store}})
    assert {"to": [{"podSelector": {}}], "ports": [{"port": 6380, "protocol": "TCP"}]} in egress(elsewhere)
    assert egress(render(KEYS)) == egress(render())


# Metrics


def test_prometheus_sends_a_key_where_the_metrics_need_one() -> None:
    (endpoint,) = one(render(TENANTS), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["port"] == "http"
    assert endpoint["authorization"] == {"credentials": {"name": "prometheus", "key": "api-key"}}
    (endpoint,) = one(render(EVERYTHING), "ServiceMonitor")["spec"]["endpoints"]
    assert "authorization" not in endpoint


@pytest.mark.parametrize(("values", "readiness"), [(EVERYTHING, "/readyz"), (TENANTS, "/readyz of the admin port")])
def test_an_alert_names_the_port_that_lists_reasons(values: dict[str, Any], readiness: str) -> None:
    (group,) = one(render(values), "PrometheusRule")["spec"]["groups"]
    alerts = {rule["alert"]: rule["annotations"]["summary"] for rule in group["rules"]}
    assert f"; {readiness} lists the reasons." in alerts["AstraNotReady"]
    assert ("monitoring.apiKey" in alerts["AstraDown"]) == (values is TENANTS)


def test_the_dashboard_shows_requests_tokens_and_refusals_by_tenant() -> None:
    dashboard = json.loads(one(render(TENANTS), "ConfigMap", "dashboard")["data"]["astra.json"])
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for name in ("requests_total", "tokens_total", "limited_total"):
        assert [query for query in queries if "by (tenant" in query and f"astra_tenant_{name}{{" in query]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_the_smoke_test_sends_its_own_key_or_that_of_requests() -> None:
    (smoke,) = one(render(TENANTS), "Pod")["spec"]["containers"]
    assert variables(smoke) == {"VLLM_API_KEY": {"name": "smoke", "key": "api-key"}}
    (smoke,) = one(render({**TENANTS, "test": {"apiKey": {"secret": ""}}}), "Pod")["spec"]["containers"]
    assert variables(smoke) == {"VLLM_API_KEY": {"name": "operators", "key": "api-key"}}


def test_probes_need_no_key() -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        found = container(render(TENANTS))[probe]["httpGet"]
        assert found["path"] in ("/livez", "/readyz")
        assert "httpHeaders" not in found


# The policy port


def test_the_policy_port_has_a_token_and_a_service_of_its_own() -> None:
    objects = render({**POLICIES, "service": {"type": "LoadBalancer"}, "apiKey": {"secret": "k"}})
    assert args(objects)["policy-port"] == "8002"
    assert args(objects)["policy-host"] == "0.0.0.0"  # noqa: S104 (in the pod)
    assert variables(container(objects))["ASTRA_POLICY_TOKEN"] == {"name": "trainer", "key": "token"}
    service = one(objects, "Service", "policies")["spec"]
    assert "type" not in service  # never a load balancer
    assert [port["targetPort"] for port in service["ports"]] == ["policies"]
    assert [port["name"] for port in one(objects, "Service", "")["spec"]["ports"]] == ["http"]


def test_the_policy_port_is_closed_until_policies_from_names_peers() -> None:
    assert ports(render(POLICIES))["policies"] == POLICIES["networkPolicy"]["policiesFrom"]
    assert "policies" not in ports(render({**POLICIES, "networkPolicy": {}}))
    off = render({**POLICIES, "policies": {"secret": ""}})
    assert "policies" not in ports(off)
    assert "policy-port" not in args(off)


@pytest.mark.parametrize(
    ("admin", "policies", "expected"),
    [(8001, 8002, [(1, 8000), (8003, 65535)]), (9000, 8002, [(1, 8001), (8003, 8999), (9001, 65535)])],
)
def test_the_nodes_of_a_group_cannot_reach_a_port_with_a_token(
    admin: int, policies: int, expected: list[tuple[int, int]]
) -> None:
    values = {**NODES, **POLICIES, "replicas": 1, "admin": {"secret": "a", "port": admin}}
    objects = render({**values, "policies": {"secret": "p", "port": policies}})
    group = one(objects, "NetworkPolicy")["spec"]["ingress"][-1]["ports"]
    assert [(port["port"], port["endPort"]) for port in group] == expected


def test_prometheus_does_not_scrape_the_policy_port() -> None:
    values = {**POLICIES, "admin": {"secret": "a"}, "monitoring": {"serviceMonitor": True}}
    objects = render(values)
    wanted = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    services = [
        found for found in objects if found["kind"] == "Service" and wanted <= found["metadata"]["labels"].items()
    ]
    assert [service["metadata"]["name"] for service in services] == ["astra"]


# Uploads, and a document that the server changes


def test_a_document_in_the_claim_is_changed_by_the_server_and_has_no_config_map() -> None:
    objects = render(TENANTS)
    assert args(objects)["adapters"] == "/adapters/adapters.yaml"
    assert mounts(objects)["adapters"] == {"name": "adapters", "mountPath": "/adapters"}
    claim = {"persistentVolumeClaim": {"claimName": "shared"}, "name": "adapters"}
    assert claim in pod(objects)["spec"]["volumes"]
    assert not [found for found in objects if found["metadata"]["name"] == "astra-adapters"]
    assert mounts(render({**TENANTS, "adaptersFile": "", "uploadTo": ""}))["adapters"]["readOnly"] is True


def test_the_worker_of_a_group_reads_the_claim_only() -> None:
    values = {key: TENANTS[key] for key in ("adaptersFile", "adaptersClaim")}
    leader, worker = roles(render({**NODES, **values}))
    leads, works = (
        {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]} for spec in (leader, worker)
    )
    assert "readOnly" not in leads["adapters"]
    assert works["adapters"]["readOnly"] is True


def test_uploads_go_to_the_folder_or_url_of_the_values() -> None:
    assert args(render(TENANTS))["upload-to"] == "/adapters/uploads"
    assert args(render({**TENANTS, "uploadTo": "s3://b/uploads"}))["upload-to"] == "s3://b/uploads"
    assert "upload-to" not in args(render({**TENANTS, "uploadTo": ""}))
