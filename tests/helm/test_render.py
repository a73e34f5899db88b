"""Every feature of the chart renders to valid objects, with each supported Helm and Kubernetes."""

import os
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helm.chart import CHART, CPU, EVERYTHING, HELMS, NODES, POLICIES, RELEASE, TENANTS, render, run, text_of

GOLDEN = Path(__file__).parent / "golden"
PROFILES = {"default": {}, "cpu": CPU, "everything": EVERYTHING, "nodes": NODES, "tenants": TENANTS}
KUBERNETES = tuple(f"1.{minor}" for minor in range(29, 38))  # from the oldest in Chart.yaml to the newest with schemas
FEATURES: dict[str, dict[str, Any]] = {
    **PROFILES,
    "nodes, scaled": {**NODES, "autoscaling": {"kind": "keda"}, "inferencePool": {"enabled": True},
                      "monitoring": {"serviceMonitor": True}},
    "hpa": {"autoscaling": {"kind": "hpa"}},
    "one picker": {"inferencePool": {"enabled": True}, "httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]},
                   "apiKey": {"checkedElsewhere": True}},
    "document in an object store": {"adaptersUrl": "s3://adapters/adapters.yaml"},
    "a claim for one pod": {"store": {"claim": {"name": "store"}}},
    "base in a claim": {"base": {"source": "/base", "claim": {"name": "base"}}},
    "no policies": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": False, "shm": ""},
    "writable root": {"podSecurity": {"readOnlyRootFilesystem": False, "user": 2000}},
    "names": {"fullnameOverride": "llm", "nameOverride": "serve", "image": {"digest": "sha256:" + "a" * 64}},
    "keys at a URL": {"tenants": {"keys": "s3://keys/keys.yaml"}},
    "policies": POLICIES,
    "policies over nodes": {**NODES, **POLICIES, "replicas": 1, "admin": {"secret": "a"}},
    "alerts": {"monitoring": {"rules": True, "serviceMonitor": True}},
    "admin API": {"admin": {"secret": "a", "port": 9001}, "service": {"type": "LoadBalancer", "port": 80},
                 "apiKey": {"secret": "k"}},
    "more volumes": {"volumes": [{"name": "a", "mountPath": "/a", "secret": "123", "subPath": "ca.crt"},
                                 {"name": "store", "mountPath": "/b", "claim": "c"}]},
    "names that YAML reads as numbers": {
        "nameOverride": "123", "hubToken": {"secret": "123", "key": "1"}, "image": {"pullSecrets": ["1"]},
        "base": {"source": "/base/x", "claim": {"name": "1", "subPath": "2024"}}, "priorityClassName": "1",
        "runtimeClassName": "1", "podLabels": {"a": "1"}, "fullnameOverride": "a"},
}  # fmt: skip


def validate(found: dict[str, Any], version: str) -> None:
    """Raise ValidationError unless an object is valid for Kubernetes, or for the schema of its custom resource."""
    crd = Path(__file__).parent / "crds" / f"{found['kind']}.yaml"
    if not crd.exists():
        kubernetes_validate.validate(found, version, strict=True)  # raises for unknown kinds, too
        return
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    assert crd.read_text(encoding="utf-8").startswith(f"# {found['apiVersion']}\n")
    jsonschema.validate(found["spec"], yaml.safe_load(crd.read_text(encoding="utf-8")))
    if found["kind"] == "LeaderWorkerSet":
        for role in ("leaderTemplate", "workerTemplate"):
            template = found["spec"]["leaderWorkerTemplate"][role]
            pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": role, **template["metadata"]}}
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_is_valid_for_every_supported_kubernetes(feature: str) -> None:
    objects = render(FEATURES[feature])
    assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)
    for found in objects:
        for version in KUBERNETES:
            validate(found, version)


@pytest.mark.parametrize("wrong", [{"unknown": 1}, {"replicas": "three"}])
def test_the_validation_refuses_unknown_fields_and_wrong_types(wrong: dict[str, Any]) -> None:
    deployment = next(o for o in render() if o["kind"] == "Deployment")
    with pytest.raises(Exception, match=r"unknown|three"):
        validate({**deployment, "spec": {**deployment["spec"], **wrong}}, KUBERNETES[-1])
    scaled = next(o for o in render(EVERYTHING) if o["kind"] == "ScaledObject")
    with pytest.raises(jsonschema.ValidationError):
        validate({**scaled, "spec": {**scaled["spec"], "unknown": 1}}, KUBERNETES[-1])


@pytest.mark.parametrize("feature", FEATURES)
def test_helm_3_and_helm_4_render_the_same_objects(feature: str) -> None:
    assert render(FEATURES[feature], "helm3") == render(FEATURES[feature], "helm4")


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("feature", FEATURES)
def test_helm_lint_finds_nothing(feature: str, helm: str) -> None:
    assert "0 chart(s) failed" in run(helm, "lint", "--strict", str(CHART), values=FEATURES[feature])


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_renders_to_its_golden_file(profile: str) -> None:
    """After a change review the difference, then write the files with ASTRA_WRITE_GOLDEN=1 and commit them."""
    file = GOLDEN / f"{profile}.yaml"
    found = text_of(PROFILES[profile], "helm3")
    if os.environ.get("ASTRA_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("helm", HELMS)
def test_the_chart_is_packaged_with_its_readme_and_without_images(helm: str, tmp_path: Path) -> None:
    run(helm, "package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    assert run(helm, "template", RELEASE, str(package))
    with tarfile.open(package) as archive:
        names = archive.getnames()
    assert {"astra/values.schema.json", "astra/README.md"} < set(names)
    assert not [name for name in names if "images" in name]
