"""TRL's own client, trainer functions and rollout code against the policy port of the real engine."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from astra_serve.adapters.version_files import version_digest
from tests.support import demo

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def url(server, admin) -> str:
    assert server.process.poll() is None
    return f"http://x:{admin.policy_token}@127.0.0.1:{admin.policies}"


def test_trls_own_code_publishes_samples_and_unloads(server, url, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.trl_rollout", url, str(demo.BASE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["publishes_adapters"] is True
    assert (found["world_size"], found["unloaded"]) == (1, 404)
    assert found["dtype"].startswith("torch.")
    assert found["max_model_len"] == httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"]
    fits = found["deviation"]  # in nats; the engine computes in bfloat16
    assert max(fits["1 by 1"], fits["2 by 2"]) < 0.05 < 0.5 < min(fits["1 by 2"], fits["2 by 1"])
    card = httpx.get(f"{url}/v1/models/trl-policy-v2").json()
    assert card["digest"] == version_digest(tmp_path / "trl-policy-v2")  # the trainer reads its own write
    assert card["proof"]["state"] == "proved"
    assert httpx.get(f"{server.url}/v1/models/trl-policy-v2").json()["root"] == card["root"]
    assert "e2e-policies" not in server.log.read_text()
    unload = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "trl-policy-v2"})
    assert unload.status_code == 200  # other tests list the models of this server


def test_a_name_that_is_loaded_again_never_answers_from_a_prefix_of_the_version_before(url, loras) -> None:
    """The prompt has several blocks of the prefix cache; the answers are those of each adapter without it."""
    prompt = list(range(3, 103))

    def load_and_ask(name: str, task: str, salt: str | None = None) -> tuple[str, list[int]]:
        body = {"lora_name": name, "lora_path": str(loras[task])}
        loaded = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60).json()
        body = {"model": name, "prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/completions", json={**body, **({"cache_salt": salt} if salt else {})}).json()
        assert answer["model"] == loaded["version"]
        return loaded["version"], answer["choices"][0]["token_ids"]

    alone = {task: load_and_ask(f"alone-{task}", task, salt=task)[1] for task in loras}
    assert alone["sql"] != alone["intent"]
    for task in ("sql", "intent", "sql", "intent"):
        assert load_and_ask("team/policy", task)[1] == alone[task]
    for name in ("team/policy", *(f"alone-{task}" for task in loras)):
        assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
