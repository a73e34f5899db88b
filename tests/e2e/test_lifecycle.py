"""How the server's processes start and end. The session's own server ends with SIGTERM, in conftest."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from astra_serve.document.keys import hash_of
from astra_serve.gateway.middleware import OPEN
from astra_serve.gateway.routes import SERVED
from tests.support import demo
from tests.support.loras import write_random_lora, write_untied_base
from tests.support.server import BIN, Server, astra_serve, free_port

pytestmark = pytest.mark.timeout(300)
KEY = "the-api-key"
OTHER_KEY = "another-api-key"
GUEST = "the-key-of-a-guest"
TEXT = "select name from people where age > 30 " * 8
HEADERS = {"Authorization": f"Bearer {KEY}"}
ADMIN_PORT = free_port()


def test_an_unknown_option_ends_with_status_2_and_is_named() -> None:
    command = [str(BIN / "astra-serve"), "--base", str(demo.BASE), "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr.splitlines()[-1]


def signalled(number: int, log: Path, when: Callable[[psutil.Process], object]) -> tuple[int, list[psutil.Process]]:
    """Send a signal to a server that starts, and return its status and the descendants that are left."""
    command = [str(BIN / "astra-serve"), "--base", str(demo.BASE), "--port", str(free_port())]
    with log.open("wb") as stream:
        process = psutil.Popen([*command, "--store", str(log.with_suffix(".store"))], stdout=stream, stderr=stream)
    while not when(process):
        assert process.poll() is None
        time.sleep(0.02)
    descendants = process.children(recursive=True)
    process.send_signal(number)
    status = process.wait(5)
    _, left = psutil.wait_procs(descendants, 5)
    return status, left


def test_a_signal_ends_a_starting_server_and_its_engine_within_5_s(tmp_path: Path) -> None:
    def no_engine_yet(process: psutil.Process) -> bool:
        return bool((tmp_path / "early").stat().st_size) or bool(process.children())

    def engine_starts(process: psutil.Process) -> bool:
        return any("EngineCore" in child.name() for child in process.children())

    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(signalled, signal.SIGINT, tmp_path / "early", no_engine_yet)
        late = pool.submit(signalled, signal.SIGTERM, tmp_path / "late", engine_starts)
        assert early.result() == (130, [])
        assert late.result() == (143, [])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untied_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with API keys, a tenant, an operator's middleware, few modules to adapt; the last test here ends it."""
    folder = tmp_path_factory.mktemp("lifecycle")
    source = write_random_lora(folder / "random", modules=("q_proj",), base=base)
    entries = ", ".join(f"{{name: {name}, source: {source}}}" for name in ("random", "guest/own"))
    (folder / "adapters.yaml").write_text(f"adapters: [{entries}]")
    (folder / "keys.yaml").write_text(
        "tenants:  # by hand\n"
        f"  - {{name: guest, keys: [{{hash: '{hash_of(GUEST)}'}}], adapters: ['guest/*'], "
        "limits: {tokens_per_minute: 1000000}}\n"
    )
    options = ["--base", str(base), "--enforce-eager", "--adapters", str(folder / "adapters.yaml")]
    options += ["--middleware", "tests.support.refusing.Refuse", "--admin-port", str(ADMIN_PORT)]
    options += ["--lora-target-modules", "q_proj", "lm_head", "--store", str(folder / "store")]
    options += ["--api-key", KEY, OTHER_KEY, "--keys", str(folder / "keys.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("ASTRA_ADMIN_TOKEN", KEY)
        with astra_serve(options, folder / "log") as running:
            yield running


@pytest.fixture
def admin(server: Server) -> Iterator[httpx.Client]:
    assert server.process.poll() is None
    with httpx.Client(base_url=f"http://127.0.0.1:{ADMIN_PORT}", headers=HEADERS, timeout=60) as client:
        yield client


def test_a_request_that_a_key_or_a_middleware_refuses_loads_nothing(server: Server, admin: httpx.Client) -> None:
    while (adapter := admin.get("/adapters/random")).json()["state"] != "serving":
        assert adapter.json()["state"] != "failed", adapter.text
        time.sleep(0.1)
    assert admin.post("/adapters/random/unload").json()["version"]["residency"] == "disk"
    body = {"model": "random", "prompt": "x", "max_tokens": 2}
    url = f"{server.url}/v1/completions"
    for headers, status in (({}, 401), ({**HEADERS, "X-Refuse": "1"}, 418)):
        assert httpx.post(url, json=body, headers=headers).status_code == status
        assert admin.get("/adapters/random").json()["version"]["residency"] == "disk"
    assert httpx.post(url, json=body, headers=HEADERS, timeout=60).status_code == 200
    assert admin.get("/adapters/random").json()["version"]["residency"] == "slot"


def test_an_adapter_of_which_the_engine_would_leave_modules_out_is_refused_by_name(
    admin: httpx.Client, base: Path, tmp_path: Path
) -> None:
    source = write_random_lora(tmp_path / "whole", modules=("q_proj", "down_proj"), base=base)
    answer = admin.put("/adapters/whole", json={"source": str(source)})
    assert answer.status_code == 422
    assert "does not adapt 6 of its modules: model.layers.0.mlp.down_proj, " in answer.json()["error"]["message"]
    assert "--lora-target-modules" in answer.json()["error"]["message"]


@pytest.mark.parametrize("n_tokens", [3, 12])
def test_log_probabilities_of_a_prompt_are_not_changed_by_another_requests_adapter_of_the_head(
    server: Server, admin: httpx.Client, base: Path, tmp_path: Path, n_tokens: int
) -> None:
    """3 tokens: as many rows of the prompt are asked for as there are rows of the batch."""
    source = write_random_lora(tmp_path / "head", modules=("lm_head",), base=base)
    url, prompt = f"{server.url}/v1/completions", list(range(5, 5 + n_tokens))
    body = {"model": "random", "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}

    def of_prompt() -> list[float]:
        answer = httpx.post(url, json=body, headers=HEADERS, timeout=60)
        assert answer.is_success, answer.text
        return answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:n_tokens]

    alone = of_prompt()
    admin.put("/adapters/head", json={"source": str(source)}).raise_for_status()
    try:
        long = {"model": "head", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url, json=long, headers=HEADERS, timeout=60) as running:
            lines = running.iter_lines()
            next(lines)
            beside = of_prompt()
            assert "data: [DONE]" in lines
        assert beside == pytest.approx(alone, abs=0.1)
        assert httpx.post(url, json={**body, "model": "head"}, headers=HEADERS, timeout=60).status_code == 400
    finally:
        admin.delete("/adapters/head").raise_for_status()


def test_every_path_of_the_application_needs_the_key_except_the_state_paths(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=HEADERS) as known, httpx.Client(base_url=server.url) as unknown:
        paths = known.get("/openapi.json").json()["paths"]
        assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} < set(paths)
        assert all(SERVED.fullmatch(path) for path in paths)
        assert known.post("/invocations", json={"model": "nobody", "prompt": "x"}).status_code == 404
        for path, methods in {**paths, "/livez": ["get"], "/readyz": ["get"], "/docs": ["get"]}.items():
            for method in methods:
                closed = unknown.request(method, path, json={}).status_code == 401
                assert closed == (path not in OPEN - {"/metrics"}), f"{method} {path}"
        assert known.get("/v1/models").is_success


def test_no_key_finds_the_prompts_of_another_one_in_the_prefix_cache(server: Server) -> None:
    """The time to the first token would tell one tenant what another one has asked."""

    def hits(key: str, path: str, **own: str) -> float:
        """Return the tokens of one long prompt that the engine finds in its cache."""
        before = found()
        content = {"prompt": TEXT} if path == "completions" else {"messages": [{"role": "user", "content": TEXT}]}
        body = {"model": "base", "max_tokens": 1, **content, **own}
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers, timeout=60).status_code == 200
        return found() - before

    def found() -> float:
        lines = httpx.get(f"{server.url}/metrics", headers=HEADERS).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    for path in ("completions", "chat/completions"):
        assert hits(KEY, path) == 0
        assert hits(KEY, path) > 100
        assert hits(OTHER_KEY, path) == 0
        assert hits(OTHER_KEY, path) > 100
        assert hits(KEY, path, cache_salt="own") == 0
        assert hits(OTHER_KEY, path, cache_salt="own") == 0
        assert hits(OTHER_KEY, path, cache_salt="own") > 100


BODIES: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "x"}]], "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}


def test_no_route_shows_a_tenant_what_is_not_its_own(server: Server, admin: httpx.Client, base: Path) -> None:
    """Every route of the real application: another's adapter, its version, the base: as a name that is nobody's."""
    while admin.get("/adapters/guest%2Fown").json()["state"] != "serving":
        time.sleep(0.1)
    version = admin.get("/adapters/random").json()["version"]["name"]
    headers = {"Authorization": f"Bearer {GUEST}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as guest:
        routes = guest.get("/openapi.json").json()["paths"]
        posts = sorted(
            path for path, methods in routes.items() if "post" in methods and "{" not in path and path not in OPEN
        )
        assert set(BODIES) <= set(posts)
        for path in posts:
            body = BODIES.get(path, {})
            own = guest.post(path, json={**body, "model": "guest/own"})
            assert own.status_code == 200 or path not in BODIES, own.text
            assert own.status_code != 401
            answers = []
            for model in ("random", version, base.name, "guest/none"):
                answer = guest.post(path, json={**body, "model": model})
                answers.append((answer.status_code, answer.text.replace(model, "NAME")))
                assert answer.status_code == 404
                assert answer.headers["x-ratelimit-limit-tokens"] == str(10**6)
            assert len({text.partition(" does not exist")[0] for _, text in answers}) == 1
            assert not any("random" in text or base.name in text for _, text in answers)
        listed = guest.get("/v1/models").text
        assert [card["id"] for card in guest.get("/v1/models").json()["data"]] == ["guest/own"], listed
        for model in ("random", version, base.name):
            assert guest.get(f"/v1/models/{model}").status_code == 404
        assert guest.get("/metrics").status_code == 403
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert guest.get("/readyz").json() == {"ready": True}
    assert admin.get("/readyz").json() == {"ready": True, "reasons": []}
    page = admin.get("/metrics").text
    assert 'tenant="guest"' in page
    for metric in ("astra_keys_fault 0", "astra_tenant_requests_total{", "astra_tenant_tokens_total{"):
        assert f"\n{metric}" in page
    assert "# HELP astra_tenant_limited_total" in page


def test_a_key_is_made_and_revoked_while_the_server_runs_and_no_log_has_it(server: Server) -> None:
    def keys(*words: str) -> str:
        command = [str(BIN / "astra-serve"), "keys", *words, "--keys", str(server.log.parent / "keys.yaml")]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()

    def within_5_s(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    def let_in() -> bool:
        try:
            return bool(client.models.list().data)
        except openai.AuthenticationError:
            return False

    key = keys("new", "team", "--adapter", "rand*", "--label", "ci")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=60, max_retries=0) as client:
        within_5_s(let_in)
        assert [model.id for model in client.models.list()] == ["random"]
        assert client.completions.create(model="random", prompt="x", max_tokens=2).choices
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="head", prompt="x")
        keys("revoke", "team", "ci")
        within_5_s(lambda: not let_in())
    assert httpx.get(f"{server.url}/readyz").json() == {"ready": True}
    log = server.log.read_text()
    assert "team" in log
    assert not [secret for secret in (key, KEY, OTHER_KEY) if secret in log]


def test_a_killed_engine_gives_errors_to_its_requests_and_ends_the_server_with_status_1(server: Server) -> None:
    """A supervisor starts it again; a process that stays up and serves nothing would never be."""
    body = {"model": "base", "prompt": "def f(", "max_tokens": 400, "ignore_eos": True}
    url = f"{server.url}/v1/completions"

    def ask(stream: bool) -> tuple[int, str]:
        answer = httpx.post(url, json={**body, "stream": stream}, headers=HEADERS, timeout=60)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(4) as pool:
        with httpx.stream("POST", url, json={**body, "stream": True}, headers=HEADERS) as running:
            lines: Iterator[str] = running.iter_lines()
            next(lines)
            asked = [pool.submit(ask, stream) for stream in (True, False, True, False)]
            engine = [c for c in psutil.Process(server.process.pid).children() if "EngineCore" in c.name()]
            assert engine
            engine[0].send_signal(signal.SIGKILL)
            assert any('"error"' in line for line in lines)  # said, and not just cut off
        for status, text in (one.result() for one in asked):
            assert status in (500, 503) or '"error"' in text
    assert server.process.wait(60) == 1
    text = server.log.read_text(errors="replace")
    *_, last = (json.loads(line)["message"] for line in text.splitlines())  # every line is JSON
    assert last.startswith("astra-serve: the engine has died")
    assert KEY not in text
    assert OTHER_KEY not in text
