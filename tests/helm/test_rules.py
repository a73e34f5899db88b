"""The rules that the rendered objects follow."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from astra_serve.document import desired
from tests.helm.chart import CPU, EVERYTHING, NODES, container, one, pod, pods, render
from tests.helm.values_table import SCHEMA


def args(objects: list[dict[str, Any]]) -> dict[str, str]:
    """Return the options of the server."""
    return dict(option.removeprefix("--").partition("=")[::2] for option in container(objects)["args"])


# Workload


def test_the_number_of_gpus_is_also_the_tensor_parallel_size() -> None:
    objects = render({"gpu": {"count": 4, "resource": "amd.com/gpu"}})
    assert container(objects)["resources"]["limits"]["amd.com/gpu"] == "4"
    assert container(objects)["resources"]["requests"]["amd.com/gpu"] == "4"
    assert args(objects)["tensor-parallel-size"] == "4"


def test_the_cpu_profile_has_no_gpu_and_its_own_image() -> None:
    objects = render(CPU)
    assert set(container(objects)["resources"]["limits"]) == {"memory"}
    assert "tensor-parallel-size" not in args(objects)
    assert container(objects)["image"].startswith("astra-serve-cpu:")


def test_dev_shm_is_in_memory_and_has_the_size_of_the_values() -> None:
    volumes = {volume["name"]: volume for volume in pod(render({"shm": "16Gi"}))["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}


def test_the_values_schedule_the_pods() -> None:
    spec = pod(render(EVERYTHING))["spec"]
    for key in ("nodeSelector", "tolerations", "affinity", "runtimeClassName", "priorityClassName"):
        assert spec[key] == EVERYTHING[key]
    (spread,) = spec["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "server"


def test_the_base_is_read_from_the_hub_a_claim_or_an_object_store() -> None:
    assert args(render())["base"] == "Qwen/Qwen3-0.6B"
    claim = render({"base": {"source": "/base/qwen", "claim": {"name": "models", "subPath": "llm"}}})
    assert args(claim)["base"] == "/base/qwen"
    mounted = {mount["name"]: mount for mount in container(claim)["volumeMounts"]}["base"]
    assert mounted == {"name": "base", "mountPath": "/base", "readOnly": True, "subPath": "llm"}
    copied = render({"base": {"source": "s3://models/qwen3-8b/"}, "objectStore": {"secret": "s3"}})
    assert args(copied)["base"] == "/base/qwen3-8b"
    (init,) = pod(copied)["spec"]["initContainers"]
    assert init["args"][1:] == ["s3://models/qwen3-8b/", "/base/qwen3-8b"]
    assert init["envFrom"] == [{"secretRef": {"name": "s3"}}]


def test_a_model_over_several_nodes_is_one_group_with_the_launcher_of_vllm_and_one_store() -> None:
    objects = render(NODES)
    assert not [found for found in objects if found["kind"] == "Deployment"]
    group = one(objects, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    assert (group["size"], group["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    leader, worker = (group[role]["spec"]["containers"][0] for role in ("leaderTemplate", "workerTemplate"))
    for found in (leader, worker):
        assert {"--nnodes=2", "--pipeline-parallel-size=2", "--tensor-parallel-size=8"} < set(found["args"])
        assert "--node-rank=$(LWS_WORKER_INDEX)" in found["args"]
        assert {"name": "store", "mountPath": "/store"} in found["volumeMounts"]
    assert "--store=/store/group-$(GROUP)" in leader["args"]
    assert "--headless" in worker["args"]
    assert "--headless" not in leader["args"]
    assert "readinessProbe" not in worker
    assert not [word for word in leader["args"] + worker["args"] if "ray" in word]
    # The LeaderWorkerSet creates a headless Service with its own name, by which its nodes find each other.
    assert one(objects, "LeaderWorkerSet")["metadata"]["name"] not in {
        found["metadata"]["name"] for found in objects if found["kind"] == "Service"
    }


def test_the_worker_of_a_group_runs_until_its_leader_has_ended() -> None:
    group = one(render(NODES), "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    (container,) = group["containers"]
    script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    compile(script, "preStop", "exec")
    assert "LWS_LEADER_ADDRESS" in script


@pytest.mark.parametrize("values", [NODES, EVERYTHING], ids=["nodes", "everything"])
def test_no_container_has_a_variable_twice(values: dict[str, Any]) -> None:
    """In a Deployment the last one is used; a LeaderWorkerSet with duplicates is refused."""
    secrets = {key: EVERYTHING[key] for key in ("hubToken", "apiKey", "admin", "objectStore", "env")}
    for spec in pods(render({**values, **secrets})):
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            names = [variable["name"] for variable in each.get("env", [])]
            assert len(names) == len(set(names))


def test_requests_reach_the_leader_of_a_group_and_the_disruption_budget_counts_every_node() -> None:
    objects = render({**NODES, "inferencePool": {"enabled": True}})
    index = "leaderworkerset.sigs.k8s.io/worker-index"
    assert one(objects, "Service", "")["spec"]["selector"][index] == "0"
    assert one(objects, "InferencePool")["spec"]["selector"]["matchLabels"][index] == "0"
    assert index not in one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]


# Adapters


def test_the_server_can_read_the_document() -> None:
    objects = render(EVERYTHING)
    text = one(objects, "ConfigMap", "adapters")["data"]["adapters.yaml"]
    document = desired.parse(text, "the ConfigMap")
    assert [adapter.name for adapter in document.adapters] == ["sql", "intent", "local"]
    sql, intent, _ = document.adapters
    assert sql.required
    assert [(step.digest[7], step.source) for step in sql.steps] == [("1", "hf://org/sql@0f9e8d"), ("2", None)]
    assert sql.steps[0].replaced == datetime(2026, 11, 27, 9, tzinfo=UTC)
    assert intent.canary == desired.Canary(**EVERYTHING["adapters"][1]["canary"])


def test_a_document_without_adapters_is_valid() -> None:
    text = one(render(), "ConfigMap", "adapters")["data"]["adapters.yaml"]
    assert desired.parse(text, "the ConfigMap").adapters == []


def test_a_change_of_adapters_does_not_change_the_pod_template() -> None:
    assert pod(render()) == pod(render({"adapters": [{"name": "a", "source": "hf://o/r"}]}))


def test_the_document_is_mounted_as_a_folder_which_kubernetes_updates() -> None:
    objects = render()
    mount = next(m for m in container(objects)["volumeMounts"] if m["name"] == "document")
    assert "subPath" not in mount
    assert args(objects)["adapters"] == f"{mount['mountPath']}/adapters.yaml"


def test_a_document_at_a_url_has_no_config_map() -> None:
    objects = render({"adaptersUrl": "s3://adapters/adapters.yaml"})
    assert args(objects)["adapters"] == "s3://adapters/adapters.yaml"
    assert not [o for o in objects if o["metadata"]["name"].endswith("-adapters")]


TEXTS = {"description", "title", "default"}
BOUNDS = {"exclusiveMinimum", "exclusiveMaximum"}  # of a canary's weight: `_checks.tpl` names them in its message


def comparable(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without texts and bounds, with references resolved and alternatives merged.

    The alternative `null` of the server's schema is dropped: the chart refuses a key without a value.
    """
    schema = definitions.get(schema.get("$ref", "").rpartition("/")[2], schema)
    if "anyOf" in schema:
        parts = [comparable(part, definitions) for part in schema["anyOf"] if part != {"type": "null"}]
        types = sorted({found for part in parts for found in part["type"]})
        return {key: value for part in parts for key, value in part.items()} | {"type": types}
    found = {key: value for key, value in schema.items() if key not in TEXTS | BOUNDS}
    found["type"] = sorted([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    if "items" in schema:
        found["items"] = comparable(schema["items"], definitions)
    if "properties" in schema:
        found["properties"] = {key: comparable(one, definitions) for key, one in schema["properties"].items()}
    return found


def test_an_adapter_has_the_schema_of_the_servers_document() -> None:
    document = desired.json_schema()
    chart = comparable(SCHEMA["properties"]["adapters"]["items"], SCHEMA["definitions"])
    assert chart["properties"].pop("rank") == {"type": ["integer"], "minimum": 1}  # for the chart alone
    assert chart == comparable(document["properties"]["adapters"]["items"], document["$defs"])


def test_local_adapters_are_read_from_their_claim_only() -> None:
    assert args(render(EVERYTHING))["adapter-root"] == "/adapters"


def test_each_replica_uses_its_own_folder_of_a_shared_claim() -> None:
    claim = {"claim": {"name": "c", "accessMode": "ReadWriteMany"}}
    for replicas in (1, 2):  # also for one replica, which may be scaled up
        shared = args(render({"store": claim, "replicas": replicas}))
        assert shared["shared-store"] == "/store"
        assert "store" not in shared
    assert args(render({"replicas": 2}))["store"] == "/store/astra"


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteOncePod"])
@pytest.mark.parametrize("claim", ["store", "base", "adaptersClaim"])
def test_a_claim_for_one_node_is_released_before_the_next_pod_starts(claim: str, mode: str) -> None:
    """Also in the CPU profile, whose rolling update would start the new pod first, and wait for it forever."""
    found: dict[str, Any] = {"name": "c", "accessMode": mode}
    values = {claim: found} if claim == "adaptersClaim" else {claim: {"claim": found, "source": "/base"}}
    if claim == "store":
        del values["store"]["source"]
    strategy = one(render({**CPU, **values}), "Deployment")["spec"]["strategy"]
    assert strategy == {"type": "Recreate"}
    found["accessMode"] = "ReadWriteMany"
    strategy = one(render({**CPU, **values}), "Deployment")["spec"]["strategy"]
    assert strategy["type"] == "RollingUpdate"


# Rolling updates and shutdown


@pytest.mark.parametrize(("drain", "before"), [(1, 1), (60, 6), (600, 15), (3600, 15)])
def test_drain_seconds_sets_pre_stop_the_deadline_of_the_server_and_the_grace_period(drain: int, before: int) -> None:
    objects = render({"drainSeconds": drain})
    assert args(objects)["drain-seconds"] == str(drain)
    assert container(objects)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(before)]
    assert pod(objects)["spec"]["terminationGracePeriodSeconds"] == before + drain + 60


@pytest.mark.parametrize("seconds", [10, 605, 7200])
def test_probes_use_livez_and_readyz_and_a_start_may_take_startup_seconds(seconds: int) -> None:
    found = container(render({"startupSeconds": seconds}))
    assert found["startupProbe"]["httpGet"]["path"] == found["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert found["readinessProbe"]["httpGet"]["path"] == "/readyz"
    budget = found["startupProbe"]["failureThreshold"] * found["startupProbe"]["periodSeconds"]
    assert seconds <= budget < seconds + 10


def test_a_rolling_update_needs_no_free_gpu() -> None:
    assert one(render(), "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert one(render(CPU), "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_disruption_budget_always_allows_one_eviction(replicas: int) -> None:
    spec = one(render({"replicas": replicas}), "PodDisruptionBudget")["spec"]
    assert spec["maxUnavailable"] == 1
    assert "minAvailable" not in spec


# Autoscaling and routing


@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_with_an_autoscaler_the_workload_sets_no_replicas(kind: str) -> None:
    objects = render({"autoscaling": {"kind": kind}, "monitoring": {"serviceMonitor": True}})
    assert "replicas" not in one(objects, "Deployment")["spec"]
    scaler = one(objects, "ScaledObject" if kind == "keda" else "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "astra"}


def test_keda_scales_on_the_queue_and_on_the_time_to_first_token() -> None:
    queue, first = one(render(EVERYTHING), "ScaledObject")["spec"]["triggers"]
    for waiting in ("vllm:num_requests_waiting", "astra_requests_waiting"):  # in the engine, and before it for a turn
        assert waiting in queue["metadata"]["query"]
    assert "astra_time_to_first_token_seconds_bucket" in first["metadata"]["query"]
    assert (queue["metadata"]["threshold"], first["metadata"]["threshold"]) == ("8", "2")
    for trigger in (queue, first):  # missing metrics are an error, which uses the fallback, and not 0
        assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_the_backend_of_a_route_is_the_service_or_the_inference_pool() -> None:
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]}, "apiKey": {"secret": "k"}}
    (rule,) = one(render(route), "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "astra", "port": 8000}]
    (rule,) = one(render({**route, "inferencePool": {"enabled": True}}), "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"][0]["kind"] == "InferencePool"


def test_the_picker_scores_replicas_by_the_adapters_in_memory() -> None:
    objects = render({"inferencePool": {"enabled": True, "weights": {"loraAffinity": 7}}})
    (profile,) = yaml.safe_load(one(objects, "ConfigMap", "picker")["data"]["plugins.yaml"])["schedulingProfiles"]
    assert {"pluginRef": "lora-affinity-scorer", "weight": 7} in profile["plugins"]
    picker = one(objects, "Deployment", "picker")["spec"]["template"]["spec"]["containers"][0]
    assert "--lora-info-metric=astra_lora_requests_info" in picker["args"]
    pool = one(objects, "InferencePool")["spec"]
    assert pool["endpointPickerRef"]["name"] == one(objects, "Service", "picker")["metadata"]["name"]


def test_only_v1_is_routed_from_outside() -> None:
    objects = render(EVERYTHING)
    (rule,) = one(objects, "Ingress")["spec"]["rules"]
    assert [path["path"] for path in rule["http"]["paths"]] == ["/v1"]
    (rule,) = one(objects, "HTTPRoute")["spec"]["rules"]
    assert [match["path"]["value"] for match in rule["matches"]] == ["/v1"]


# Security


@pytest.mark.parametrize("values", [{}, CPU, EVERYTHING, NODES], ids=["default", "cpu", "everything", "nodes"])
def test_every_pod_follows_the_restricted_pod_security_standard(values: dict[str, Any]) -> None:
    found = pods(render(values))
    assert len(found) >= 2
    for spec in found:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        picker = spec.get("serviceAccountName", "").endswith("-picker")
        assert spec.get("automountServiceAccountToken") is (None if picker else False)
        assert spec["enableServiceLinks"] is False
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_every_folder_that_the_server_writes_is_a_volume() -> None:
    mounts = {mount["mountPath"] for mount in container(render())["volumeMounts"]}
    assert {"/home/astra", "/tmp", "/store", "/dev/shm"} <= mounts  # noqa: S108
    assert {"name": "HOME", "value": "/home/astra"} in container(render())["env"]


def test_the_admin_port_is_closed_until_admin_from_names_peers() -> None:
    assert "admin-port" not in args(render())
    closed = render({"admin": {"secret": "a"}})
    assert args(closed)["admin-port"] == "8001"
    assert "admin" not in ports(closed)
    peers = [{"podSelector": {"matchLabels": {"role": "operator"}}}]
    opened = render({"admin": {"secret": "a"}, "networkPolicy": {"adminFrom": peers}})
    assert ports(opened)["admin"] == peers


def ports(objects: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the peers that the network policy lets in, by port."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in one(objects, "NetworkPolicy", "")["spec"]["ingress"]:
        for port in rule["ports"]:
            found.setdefault(port["port"], []).extend(rule["from"])
    return found


def test_the_network_policy_allows_requests_dns_and_https_only() -> None:
    spec = one(render(), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert ports(render())["http"][0] == {"podSelector": {}}
    assert {port["port"] for rule in spec["egress"] for port in rule["ports"]} == {53, 5353, 443}


def test_the_smoke_test_is_always_let_in() -> None:
    closed = render({"networkPolicy": {"from": []}})
    (peer,) = ports(closed)["http"]
    labels = one(closed, "Pod")["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_nodes_of_a_group_cannot_reach_the_admin_port() -> None:
    objects = render({**NODES, "admin": {"secret": "a"}})
    group = one(objects, "NetworkPolicy")["spec"]["ingress"][-1]["ports"]
    assert [(port["port"], port["endPort"]) for port in group] == [(1, 8000), (8002, 65535)]


def test_the_picker_has_a_network_policy() -> None:
    spec = one(render(EVERYTHING), "NetworkPolicy", "picker")["spec"]
    assert [port["port"] for rule in spec["ingress"] for port in rule["ports"]] == ["grpc"]


def test_values_add_annotations_and_volumes() -> None:
    objects = render(EVERYTHING)
    account = one(objects, "ServiceAccount", "")
    assert account["metadata"]["annotations"] == EVERYTHING["serviceAccount"]["annotations"]
    assert account["automountServiceAccountToken"] is False
    assert one(objects, "Deployment", "")["metadata"]["annotations"] == {"d/e": "f"}
    (copy,) = pod(objects)["spec"]["initContainers"]  # it reads the object store, too
    for each in (container(objects), copy):
        assert {"name": "more-ca", "mountPath": "/etc/ssl/ours", "readOnly": True} in each["volumeMounts"]
    assert {"name": "more-ca", "configMap": {"name": "ca"}} in pod(objects)["spec"]["volumes"]


def test_pod_labels_of_the_values_do_not_replace_labels_of_the_selector() -> None:
    labels = {"app.kubernetes.io/component": "mine", "team": "nlp"}
    objects = render({"podLabels": labels})
    selector = one(objects, "Deployment")["spec"]["selector"]["matchLabels"]
    assert pod(objects)["metadata"]["labels"] == {**labels, **selector}


def test_the_smoke_test_and_the_picker_get_scheduling_pull_secrets_and_egress_of_the_values() -> None:
    objects = render(EVERYTHING)
    smoke = one(objects, "Pod")["spec"]
    assert smoke["nodeSelector"] == EVERYTHING["nodeSelector"]
    assert smoke["tolerations"] == EVERYTHING["tolerations"]
    picker = one(objects, "Deployment", "picker")["spec"]["template"]["spec"]
    assert picker["imagePullSecrets"] == [{"name": "registry"}]
    egress = one(objects, "NetworkPolicy", "picker")["spec"]["egress"]
    more = render({**EVERYTHING, "networkPolicy": {"to": [{"ports": [{"port": 8443}]}]}})
    assert one(more, "NetworkPolicy", "picker")["spec"]["egress"][-1] == {"ports": [{"port": 8443}]}
    assert {port["port"] for rule in egress for port in rule.get("ports", [])} >= {443, 6443}


@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_prometheus_is_let_in_for_autoscaling(kind: str) -> None:
    objects = render({"autoscaling": {"kind": kind}, "monitoring": {"serviceMonitor": kind == "keda"}})
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}} in ports(objects)[
        "http"
    ]


def test_secrets_are_references_and_never_values() -> None:
    found = {variable["name"]: variable for variable in container(render(EVERYTHING))["env"]}
    for name, secret in (("HF_TOKEN", "hub"), ("VLLM_API_KEY", "keys"), ("ASTRA_ADMIN_TOKEN", "admin")):
        assert found[name]["valueFrom"]["secretKeyRef"]["name"] == secret
        assert "value" not in found[name]
    assert not [o for o in render(EVERYTHING) if o["kind"] == "Secret"]
    (copy,) = pod(render(EVERYTHING))["spec"]["initContainers"]
    assert not {"HF_TOKEN", "VLLM_API_KEY", "ASTRA_ADMIN_TOKEN"} & {variable["name"] for variable in copy["env"]}
    assert not any(re.search(r"(?i)key|token", option) for option in container(render(EVERYTHING))["args"])


# Monitoring


def test_metrics_whose_labels_list_adapters_are_dropped() -> None:
    (endpoint,) = one(render(EVERYTHING), "ServiceMonitor")["spec"]["endpoints"]
    (rule,) = endpoint["metricRelabelings"]
    assert rule["action"] == "drop"
    for name in ("vllm:lora_requests_info", "astra_lora_requests_info"):
        assert re.fullmatch(rule["regex"], name)
    assert not re.fullmatch(rule["regex"], "astra_requests_total")


def test_the_service_monitor_selects_one_service() -> None:
    """Also where a parent chart contains the chart twice."""
    objects = render(EVERYTHING)
    others = render({**EVERYTHING, "nameOverride": "other", "fullnameOverride": "other"})
    wanted = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    services = [o for o in [*objects, *others] if o["kind"] == "Service" and wanted <= o["metadata"]["labels"].items()]
    assert [service["metadata"]["name"] for service in services] == ["astra"]


def test_each_release_has_its_own_title_and_id_of_the_dashboard() -> None:
    dashboard = json.loads(one(render(EVERYTHING), "ConfigMap", "dashboard")["data"]["astra.json"])
    assert (dashboard["title"], dashboard["uid"]) == ("Astra: apps/astra", "apps-astra")
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"$datasource"}
