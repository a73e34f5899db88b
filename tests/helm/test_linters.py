"""Checks by other tools: checkov on the objects, hadolint on the images, promtool on alerts and queries."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, CPU, EVERYTHING, NODES, POLICIES, TENANTS, one, render, text_of
from tests.helm.tools import FOLDER

LINTERS = FOLDER / "linters" / "bin"
ACCEPTED: dict[str, str] = yaml.safe_load((Path(__file__).parent / "checkov.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The findings of checkov in all profiles."""
    folder = tmp_path_factory.mktemp("rendered")
    profiles = {"default": {}, "cpu": CPU, "everything": EVERYTHING, "nodes": NODES}
    for name, values in {**profiles, "tenants": TENANTS, "policies": POLICIES}.items():
        (folder / f"{name}.yaml").write_text(text_of(values), encoding="utf-8")
    command = [
        LINTERS / "checkov",
        "-d",
        folder,
        "--framework",
        "kubernetes",
        "--output",
        "json",
        "--quiet",
        "--skip-download",
    ]
    done = subprocess.run([*command, "--compact"], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 300
    found: list[dict[str, Any]] = report["results"]["failed_checks"]
    return found


def test_every_finding_of_checkov_is_accepted_with_a_reason(findings: list[dict[str, Any]]) -> None:
    new = {f"{f['check_id']} {f['check_name']}: {f['resource']}" for f in findings if f["check_id"] not in ACCEPTED}
    assert new == set()


def test_every_accepted_finding_still_occurs(findings: list[dict[str, Any]]) -> None:
    assert set(ACCEPTED) == {finding["check_id"] for finding in findings}


@pytest.mark.parametrize("file", sorted((CHART / "images").glob("*.Dockerfile")), ids=lambda file: file.name)
def test_hadolint_finds_nothing_in_a_dockerfile(file: Path) -> None:
    done = subprocess.run([LINTERS / "hadolint", str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_alerts_and_the_queries_are_valid_for_prometheus(tmp_path: Path) -> None:
    objects = render(EVERYTHING)
    spec = one(objects, "PrometheusRule")["spec"]
    dashboard = json.loads(one(objects, "ConfigMap", "dashboard")["data"]["astra.json"])
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [trigger["metadata"]["query"] for trigger in one(objects, "ScaledObject")["spec"]["triggers"]]
    as_rules = [
        {"record": f"query:{i}", "expr": query.replace("$__rate_interval", "5m")} for i, query in enumerate(queries)
    ]
    assert len(as_rules) > 20
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [*spec["groups"], {"name": "queries", "rules": as_rules}]}))
    done = subprocess.run([FOLDER / "promtool", "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


INFO, PROBES = "astra_adapter_info", "astra_adapter_probes_total"
ALERTS = {  # name: a series for which the alert fires after 31 minutes, and one for which it does not
    "AstraNotReady": ("astra_ready{}", "0x60", "astra_ready{}", "1x60"),
    "AstraNoneReady": ("astra_ready{}", "0x60", "astra_ready{}", "1x60"),
    "AstraDown": ("up{}", "0x60", "up{}", "1x60"),
    "AstraAbsent": ("other{}", "1x60", "astra_ready{}", "1x60"),
    # Three restarts, seven minutes apart, and a single one.
    "AstraRestarts": (
        "process_start_time_seconds{}", "0 " * 7 + "1 " * 7 + "2 " * 7 + "3 " * 20,
        "process_start_time_seconds{}", "0 " * 20 + "1 " * 40,
    ),
    "AstraDocument": ("astra_document_fault{}", "1x60", "astra_document_fault{}", "0x60"),
    "AstraKeys": ("astra_keys_fault{}", "1x60", "astra_keys_fault{}", "0x60"),
    "AstraLimitsStore": ("astra_limits_store_fault{}", "1x60", "astra_limits_store_fault{}", "0x60"),
    # A fetch that is retried: failed for two minutes, fetching for one, repeatedly.
    "AstraAdapterFailed": (
        f'{INFO}{{adapter="sql",state="failed"}}', "1 1 _ " * 20, f'{INFO}{{adapter="sql",state="serving"}}', "1x60",
    ),
    # The counter of failed probes has no series before the first failure.
    "AstraProbesFail": (
        f'{PROBES}{{adapter="sql",result="failed"}}', "_x20 1x60",
        f'{PROBES}{{adapter="sql",result="passed"}}', "0+1x60",
    ),
    "AstraErrors": (
        'astra_requests_total{outcome="server_error"}', "0+60x60", 'astra_requests_total{outcome="ok"}', "0+60x60",
    ),
}  # fmt: skip


def check_alert(folder: Path, alert: str, series: list[tuple[str, str]], expected: list[dict[str, Any]]) -> None:
    """Assert which `alert` fires 31 minutes after the start of `series`, which get the labels of the release."""
    labelled = [
        {"series": name.replace("{", '{namespace="apps",service="astra",', 1), "values": values}
        for name, values in series
    ]
    wanted = {"expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}', "eval_time": "31m", "exp_samples": expected}
    wanted["expr"] = f"count by (adapter) ({wanted['expr']})"
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [{"interval": "1m", "input_series": labelled, "promql_expr_test": [wanted]}],
    }
    (folder / "rules.yaml").write_text(yaml.safe_dump(one(render(EVERYTHING), "PrometheusRule")["spec"]))
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    command = [FOLDER / "promtool", "test", "rules", folder / "test.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_for_its_fault_and_not_without_it(alert: str, tmp_path: Path) -> None:
    bad, bad_values, good, good_values = ALERTS[alert]
    labels = '{adapter="sql"}' if "adapter=" in bad else "{}"
    check_alert(tmp_path, alert, [(bad, bad_values)], [{"labels": labels, "value": 1}])
    check_alert(tmp_path, alert, [(good, good_values)], [])


def test_an_alert_fires_when_requests_wait_at_every_replica(tmp_path: Path) -> None:
    """In the engine's queue, and in that of the gateway, which holds requests back for fair shares of tenants."""
    ready, engine, gateway = ("astra_ready{}", "1x60"), "vllm:num_requests_waiting{}", "astra_requests_waiting{}"
    for waiting in ([(engine, "17x60")], [(gateway, "17x60")], [(engine, "8x60"), (gateway, "9x60")]):
        check_alert(tmp_path, "AstraQueue", [*waiting, ready], [{"labels": "{}", "value": 1}])
    check_alert(tmp_path, "AstraQueue", [(engine, "8x60"), (gateway, "8x60"), ready], [])


def test_an_alert_fires_when_replicas_serve_different_versions(tmp_path: Path) -> None:
    def info(pod: str, version: str) -> tuple[str, str]:
        return f'astra_adapter_info{{pod="{pod}",adapter="{version.split("@")[0]}",version="{version}"}}', "1x40"

    series = [info("a", "sql@1"), info("b", "sql@2"), info("a", "same@1"), info("b", "same@1")]
    check_alert(tmp_path, "AstraAdaptersDrift", series, [{"labels": '{adapter="sql"}', "value": 1}])
