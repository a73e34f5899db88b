"""Render the chart with a real Helm, and read the objects as dicts."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.helm.tools import FOLDER

CHART = Path(__file__).parents[2] / "helm"
HELMS = ("helm3", "helm4")
NAMESPACE, RELEASE = "apps", "astra"

# Values that use every feature of the chart.
EVERYTHING: dict[str, Any] = {
    "replicas": 3,
    "base": {"source": "s3://models/qwen3-8b"},
    "hubToken": {"secret": "hub"},
    "objectStore": {"secret": "s3"},
    "apiKey": {"secret": "keys"},
    "admin": {"secret": "admin"},
    "adapters": [
        {"name": "sql", "source": "hf://org/sql@1a2b3c", "required": True, "rank": 32, "previous": [
            {"digest": f"sha256:{'1' * 64}", "source": "hf://org/sql@0f9e8d", "replaced": "2026-11-27T09:00:00Z"},
            f"sha256:{'2' * 64}"]},
        {"name": "intent", "source": "s3://adapters/intent", "pin": True,
         "canary": {"version": "s3://adapters/intent-2", "digest": f"sha256:{'3' * 64}", "weight": 0.1}},
        {"name": "local", "source": "/adapters/local"},
    ],
    "adaptersClaim": {"name": "adapters"},
    "store": {"claim": {"name": "store", "accessMode": "ReadWriteMany"}},
    "engine": {"args": ["--max-model-len=8192"]},
    "env": [{"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "PROXY_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "password"}}}],
    "gpu": {"count": 4},
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}]}}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "runtimeClassName": "nvidia",
    "priorityClassName": "serving",
    "annotations": {"d/e": "f"},
    "podAnnotations": {"a/b": "c"},
    "podLabels": {"team": "nlp"},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/models"}},
    "volumes": [{"name": "ca", "mountPath": "/etc/ssl/ours", "configMap": "ca"}],
    "image": {"pullSecrets": ["registry"]},
    "autoscaling": {"kind": "keda", "maxReplicas": 6},
    "ingress": {"enabled": True, "className": "nginx", "host": "llm.example.com", "tlsSecret": "tls"},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["llm.example.com"]},
    "inferencePool": {"enabled": True, "replicas": 2},
    "networkPolicy": {"adminFrom": [{"podSelector": {"matchLabels": {"role": "operator"}}}]},
    "monitoring": {"serviceMonitor": True, "rules": True, "dashboard": True, "labels": {"release": "prometheus"}},
}  # fmt: skip
CPU: dict[str, Any] = yaml.safe_load((CHART / "values-cpu.yaml").read_text(encoding="utf-8"))
NODES: dict[str, Any] = {
    "nodes": 2,
    "replicas": 2,
    "gpu": {"count": 8},
    "base": {"source": "/base/llama-405b", "claim": {"name": "models", "subPath": "llm"}},
    "store": {"claim": {"name": "store", "accessMode": "ReadWriteMany"}},
}

# Tenants with keys and limits, and an adapter document that the admin API changes. No endpoint picker: it has no key.
TENANTS: dict[str, Any] = {
    **CPU,
    "replicas": 2,
    "adaptersFile": "/adapters/adapters.yaml",
    "adaptersClaim": {"name": "shared", "accessMode": "ReadWriteMany"},
    "uploadTo": "/adapters/uploads",
    "apiKey": {"secret": "operators"},
    "admin": {"secret": "admin"},
    "tenants": {"keys": "tenants", "limitsStore": {"secret": "limits"}},
    "autoscaling": {"kind": "keda"},
    "networkPolicy": {"limitsStoreTo": [{"podSelector": {"matchLabels": {"app": "valkey"}}}]},
    "monitoring": {"serviceMonitor": True, "rules": True, "dashboard": True, "apiKey": {"secret": "prometheus"}},
    "test": {"apiKey": {"secret": "smoke"}},
}
# A trainer of reinforcement learning beside one replica.
POLICIES: dict[str, Any] = {
    "adaptersClaim": {"name": "shared"},
    "policies": {"secret": "trainer"},
    "networkPolicy": {"policiesFrom": [{"podSelector": {"matchLabels": {"role": "trainer"}}}]},
}


class RenderError(Exception):
    """Helm refuses the values; the text is its message."""


def run(helm: str, *args: str, values: dict[str, Any] | None = None) -> str:
    """Return the output of Helm. Raises RenderError."""
    command = [str(FOLDER / helm), *args]
    if values is not None:
        command += ["--values", "-"]
    done = subprocess.run(command, input=json.dumps(values or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RenderError(done.stderr)
    return done.stdout


def text_of(values: dict[str, Any] | None = None, helm: str = "helm4") -> str:
    """Return the chart rendered with `values`, as text. Raises RenderError."""
    return run(helm, "template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=values or {})


def render(values: dict[str, Any] | None = None, helm: str = "helm4") -> list[dict[str, Any]]:
    """Return the chart rendered with `values`, as objects. Raises RenderError."""
    return [found for found in yaml.safe_load_all(text_of(values, helm)) if found]


def one(objects: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    """Return the only object of a kind, or of a kind and the name RELEASE-`name` (RELEASE for an empty name)."""
    wanted = None if name is None else f"{RELEASE}-{name}" if name else RELEASE
    (found,) = (o for o in objects if o["kind"] == kind and wanted in (None, o["metadata"]["name"]))
    return found


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the pod template of the server's Deployment."""
    template: dict[str, Any] = one(objects, "Deployment", "")["spec"]["template"]
    return template


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the server's container."""
    found: dict[str, Any] = pod(objects)["spec"]["containers"][0]
    return found


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the specs of all pods: of Pod objects, and of the pod templates of Deployments and LeaderWorkerSets."""
    found = []
    for each in objects:
        if each["kind"] == "Pod":
            found.append(each["spec"])
        elif each["kind"] == "Deployment":
            found.append(each["spec"]["template"]["spec"])
        elif each["kind"] == "LeaderWorkerSet":
            group = each["spec"]["leaderWorkerTemplate"]
            found += [group[role]["spec"] for role in ("leaderTemplate", "workerTemplate")]
    return found
