"""Hot-swapping on the real engine, under load; benchmarks.swap does it longer, and against vLLM's own way."""

import asyncio
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import demo, swap
from tests.support.server import Server
from trainer.embedded import tasks

pytestmark = pytest.mark.timeout(400)
CHART = Path(__file__).parents[2] / "helm"
OF_TENANTS = {
    "astra_keys_fault",
    "astra_limits_store_fault",
    "astra_tenant_requests_total",
    "astra_tenant_tokens_total",
    "astra_tenant_limited_total",
}


def test_swapping_under_load_fails_no_request_and_mixes_no_versions(server, admin, loras) -> None:
    adapters = [loras[task] for task in swap.TASKS]
    found = asyncio.run(swap.swapped(server, admin.port, admin.token, adapters, swap.Pace(30, 0.4, 2.0)))
    assert found["swaps"] == 30
    assert found["requests"] > 100
    assert (found["failed"], found["mixed"], found["examples"]) == (0, 0, [])
    assert found["broken"] is None
    assert found["left_in_engine"] == 1  # the one that serves; what it replaced has left


def test_the_engines_answers_match_the_converters_record(api: httpx.Client, loras) -> None:
    for task in loras:
        probe = api.get(f"/adapters/{task}").json()["version"]["probe"]
        assert probe["recorded"] is True
        assert probe["deviation"] < 0.1
        assert probe["effect"] > 0.3


def test_weights_that_do_not_match_their_probe_never_serve(api: httpx.Client, loras, tmp_path: Path) -> None:
    """Another adapter's weights under a probe that was recorded of this one: only the engine can tell."""
    forged = tmp_path / "forged"
    shutil.copytree(loras["intent"], forged)
    shutil.copyfile(loras["sql"] / "astra.json", forged / "astra.json")
    answer = api.put("/adapters/forged", json={"source": str(forged)})
    assert answer.status_code == 422
    assert "nats from what the adapter should say" in answer.json()["error"]["message"]
    assert api.get("/adapters/forged").status_code == 404


def test_a_version_damaged_in_the_store_fails_alone_when_it_is_loaded_again(
    api: httpx.Client, client, server, loras
) -> None:
    assert api.put("/adapters/team%2Fdamaged", json={"source": str(loras["sql"])}).is_success
    assert api.put("/adapters/team%2Fdamaged", json={"source": str(loras["intent"])}).is_success
    # The version before has left the engine: its next request reads it from the store.
    before = api.get("/adapters/team%2Fdamaged").json()["previous"][0]
    store = Path(server.log).parent / "store" / "versions" / before["digest"].removeprefix("sha256:")
    weights = store / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        body = {"model": before["name"], "prompt": "x", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 503
        assert "was changed in the store" in answer.json()["error"]["message"]
    finally:
        weights.write_bytes(whole)
    for task in loras:
        row = tasks.rows(task, test=True, n=1)[0]
        assert demo.ask(client, task, row)
    assert server.process.poll() is None
    assert api.delete("/adapters/team%2Fdamaged").is_success


def test_a_version_whose_file_is_gone_serves_from_memory_and_is_fetched_again_later(
    api: httpx.Client, server, loras
) -> None:
    version = api.put("/adapters/team%2Fgone", json={"source": str(loras["sql"])}).json()["version"]
    store = Path(server.log).parent / "store" / "versions" / version["digest"].removeprefix("sha256:")
    (store / "adapter_model.safetensors").unlink()

    def ask() -> httpx.Response:
        body = {"model": "team/gone", "prompt": "x", "max_tokens": 4}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    assert ask().status_code == 200
    api.post("/adapters/team%2Fgone/unload").raise_for_status()
    while (answer := ask()).status_code == 503:  # until the server's timer has seen it, and fetched it again
        assert "the store" in answer.json()["error"]["message"]
        time.sleep(0.2)
    assert answer.json()["model"] == version["name"]
    events = [e for e in api.get("/events").json()["events"] if e["adapter"] == "team/gone"]
    assert {"load_failed", "failed"} <= {event["event"] for event in events}
    assert api.delete("/adapters/team%2Fgone").is_success


def test_residency_slot_is_read_from_the_engine(api: httpx.Client, client, loras) -> None:
    for task in loras:
        assert demo.ask(client, task, tasks.rows(task, test=True, n=1)[0])
        assert api.get(f"/adapters/{task}").json()["version"]["residency"] == "slot"
    assert api.post("/adapters/sql/unload").json()["version"]["residency"] == "disk"
    assert demo.ask(client, "sql", tasks.rows("sql", test=True, n=1)[0])
    assert api.get("/adapters/sql").json()["version"]["residency"] == "slot"


def test_the_metrics_page_has_adapters_and_the_engine(server: Server, api: httpx.Client, client) -> None:
    before = metrics(server)
    demo.ask(client, "sql", tasks.rows("sql", test=True, n=1)[0])
    requests = 'astra_requests_total{adapter="sql",outcome="ok"}'
    until(lambda: metrics(server)[requests] > before[requests])
    after = metrics(server)
    assert after[requests] == before[requests] + 1
    for name in ("astra_prompt_tokens_total", "astra_output_tokens_total"):
        assert after[f'{name}{{adapter="sql"}}'] > before[f'{name}{{adapter="sql"}}']
    for name in ("astra_time_to_first_token_seconds", "astra_inter_token_latency_seconds"):
        assert after[f'{name}_count{{adapter="sql"}}'] == before[f'{name}_count{{adapter="sql"}}'] + 1
        assert after[f'{name}_sum{{adapter="sql"}}'] > 0
    version = api.get("/adapters/sql").json()["version"]["name"]
    assert after[f'astra_adapter_info{{adapter="sql",state="serving",version="{version}"}}'] == 1
    assert after["astra_ready"] == 1
    assert any(name.startswith("vllm:") for name in after)


def test_a_first_token_is_counted_before_the_stream_ends(server: Server) -> None:
    count = 'astra_time_to_first_token_seconds_count{adapter="sql"}'
    before = metrics(server)[count]
    body = {"model": "sql", "prompt": "Table a (b, c)", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert metrics(server)[count] == before + 1
        assert "data: [DONE]" in lines
    assert metrics(server)[count] == before + 1


def test_every_metric_that_the_chart_names_is_on_the_page(server: Server) -> None:
    """Alerts, dashboard, autoscaler and endpoint picker would stay silent for ever otherwise."""
    page = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
    there = {family.name + suffix for family in page for suffix in suffixes.get(family.type, [""])}
    files = [*(CHART / "templates").glob("*.yaml"), CHART / "files" / "dashboard.json"]
    named = {
        n for file in files for n in re.findall(r"\b(?:astra_[a-z_]+|vllm:[a-z_]+|process_[a-z_]+)", file.read_text())
    }
    assert len(named) > 15
    assert named - there == OF_TENANTS  # of servers with a keys document, and with Redis: see test_lifecycle


def test_the_router_metric_has_the_names_of_requests(server: Server, client) -> None:
    demo.ask(client, "sql", tasks.rows("sql", test=True, n=1)[0])
    (found,) = (name for name in metrics(server) if name.startswith("astra_lora_requests_info"))
    labels = dict(re.findall(r'(\w+)="([^"]*)"', found))
    assert "sql" in labels["running_lora_adapters"].split(",")
    assert int(labels["max_lora"]) >= 1


def test_the_charts_smoke_test_passes_on_a_live_server_and_fails_where_nothing_listens(server: Server) -> None:
    smoke = [sys.executable, str(CHART / "files" / "smoke.py")]
    done = subprocess.run([*smoke, server.url], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("answered by") == 2  # the base, and one adapter's version
    assert "@" in done.stdout
    dead = subprocess.run([*smoke, "http://127.0.0.1:9"], capture_output=True, text=True, check=False, timeout=60)
    assert dead.returncode == 1
    assert len(dead.stderr.splitlines()) == 1


def until(look: Callable[[], Any]) -> Any:
    """Returns what `look` finds, after 10 s at most: the server's log and counters may follow an answer by a moment."""
    end = time.monotonic() + 10
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def lines_of(server: Server, request_id: str) -> list[dict[str, Any]]:
    lines = server.log.read_text().splitlines()
    return [json.loads(line) for line in lines if f'"request_id": "{request_id}"' in line]


def metrics(server: Server) -> dict[str, float]:
    """Return the values of the series, as Prometheus stores them: without empty labels."""
    page = httpx.get(f"{server.url}/metrics").text.replace(',version=""', "")
    lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def test_the_tokens_of_a_request_are_in_the_usage_at_once_and_on_the_disk_within_2_s(
    server: Server, api: httpx.Client
) -> None:
    def used(url: httpx.URL | str) -> dict[str, int]:
        return api.get(url, params={"adapter": "sql"}).json()["total"]

    def on_disk() -> int:
        with closing(sqlite3.connect(server.log.parent / "store" / "usage.sqlite")) as ledger:
            return ledger.execute("SELECT sum(requests) FROM usage WHERE adapter = 'sql'").fetchone()[0] or 0

    prompt = list(range(3, 103)) * 3  # several blocks of the prefix cache
    body = {"model": "sql", "prompt": prompt, "max_tokens": 3, "ignore_eos": True, "cache_salt": "usage"}
    before = used("/usage")
    for _ in range(2):
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).is_success
    end = time.monotonic() + 2
    after = until(lambda: (now := used("/usage"))["requests"] == before["requests"] + 2 and now)
    tokens = {name: after[f"{name}_tokens"] - before[f"{name}_tokens"] for name in ("prompt", "cached", "output")}
    assert (tokens["prompt"], tokens["output"]) == (600, 6)
    assert 0 < tokens["cached"] < 300  # of the second prompt; its last block is computed
    assert used(f"{server.url}/usage") == after  # without keys everyone reads all of it
    until(lambda: on_disk() == after["requests"])
    assert time.monotonic() < end


def test_every_request_has_a_line_of_json_in_the_log_with_its_id_adapter_and_version(server: Server) -> None:
    body = {"model": "sql", "prompt": "x", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "find-me"}, timeout=60)
    assert answer.headers["x-request-id"] == "find-me"
    (line,) = until(lambda: lines_of(server, "find-me"))
    assert (line["adapter"], line["version"], line["outcome"]) == ("sql", answer.json()["model"], "ok")
    assert (line["output_tokens"], line["status"]) == (3, 200)
    assert "e2e-token" not in server.log.read_text()
