"""The promises that only the real engine can keep: real HTTP, the official client, adapters trained in this session."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import TASKS
from tests.support import demo
from tests.support.prompts import learned
from tests.support.server import Server
from trainer.embedded import tasks

pytestmark = pytest.mark.timeout(500)
# bfloat16 has 8 significant bits: two logits of about 20 that are this close may swap between two correct engines.
NEAR_TIE = 0.25


def question(row: tasks.Row, tokenizer) -> str:
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
    return row["prompt"]


def whole(row: tasks.Row, tokenizer) -> str:
    if "messages" in row:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        return text.rstrip("\n").removesuffix(tokenizer.eos_token)
    return (row["prompt"] + row["completion"]).rstrip("\n")


def assert_greedy(model, prompt: list[int], served: list[int]) -> bool:
    """Fail when a served token is not, but for a near-tie, the model's best after the tokens before it.

    Returns whether all of them are the best.
    """
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + served])).logits[0, len(prompt) - 1 : -1].float()
    gaps = logits.max(-1).values - logits.gather(-1, torch.tensor(served)[:, None])[:, 0]
    assert gaps.max() < NEAR_TIE, f"a token of {served} is {gaps.max():.3f} below the reference's best"
    return bool(gaps.max() == 0)


@pytest.mark.parametrize("task", TASKS)
def test_every_adapter_solves_its_task_and_the_base_does_not(client: openai.OpenAI, task: str) -> None:
    rows = tasks.rows(task, test=True, n=100)
    assert demo.exact_match(client, task, task, rows) > demo.ADAPTER_AT_LEAST
    assert demo.exact_match(client, "base", task, rows) < demo.BASE_AT_MOST


@pytest.mark.parametrize("task", TASKS)
def test_greedy_tokens_equal_those_of_transformers_and_peft(
    client: openai.OpenAI, loras: dict[str, Path], task: str
) -> None:
    """On 24 prompts, token by token; where they part, PEFT's two best logits must be a near-tie, or the test fails."""
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    base = AutoModelForCausalLM.from_pretrained(demo.BASE)
    model = PeftModel.from_pretrained(base, loras[task]).eval()
    same = 0
    for row in tasks.rows(task, test=True, n=24):
        prompt = tokenizer(question(row, tokenizer))["input_ids"]
        answer = client.completions.create(
            model=task, prompt=prompt, max_tokens=32, temperature=0, extra_body={"return_token_ids": True}
        )
        served = answer.choices[0].model_extra["token_ids"]
        assert served
        same += assert_greedy(model, prompt, served)
    assert same >= 20


@pytest.mark.parametrize("task", TASKS)
def test_the_prompts_of_training_rows_have_the_ids_that_the_server_makes(server: Server, task: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    for row in tasks.rows(task, test=True, n=10):
        asked = {"messages": row["messages"][:-1]} if "messages" in row else {"prompt": row["prompt"]}
        prompt, ids = learned(row, tokenizer)
        made = httpx.post(f"{server.url}/tokenize", json={"model": task, **asked}).json()["tokens"]
        assert made == prompt
        assert tokenizer.decode(prompt) == question(row, tokenizer)
        assert tokenizer.decode(ids).removesuffix(tokenizer.eos_token).rstrip("\n") == whole(row, tokenizer)


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_the_engine_compiles_the_model_with_its_adapters_and_takes_the_fast_kernel(server: Server) -> None:
    """Both are silent when they do not happen: every answer would be right, and late."""
    log = server.log.read_text(errors="replace")
    assert "Warming up model for the compilation" in log
    assert "Using GroupedPunicaWrapper" in log
    assert "LoRA uses PyTorch's matrix products: the faster kernel cannot be compiled" not in log


def test_models_lists_the_base_and_every_adapter_with_its_parent(client: openai.OpenAI) -> None:
    models = {model.id: model.model_extra["parent"] for model in client.models.list()}
    assert models == {"base": None, **dict.fromkeys(TASKS, "base")}
    assert [client.models.retrieve(name).id for name in models] == list(models)


@pytest.mark.parametrize("task", TASKS)
def test_streaming_gives_the_same_answer_and_names_the_adapter(client: openai.OpenAI, task: str) -> None:
    row = tasks.rows(task, test=True, n=3)[2]
    whole = demo.ask(client, task, row)
    if "messages" in row:
        chunks = list(
            client.chat.completions.create(
                model=task, messages=row["messages"][:-1], max_completion_tokens=64, temperature=0, stream=True
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    else:
        chunks = list(
            client.completions.create(model=task, prompt=row["prompt"], max_tokens=64, temperature=0, stream=True)
        )
        text = "".join(c.choices[0].text for c in chunks if c.choices)
    assert len(chunks) > 2
    (version,) = {chunk.model for chunk in chunks}
    assert version.startswith(f"{task}@")
    assert text.strip() == whole


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("model", ["no-such-adapter", "../../etc", "/etc/passwd", "sql/../intent"])
def test_an_unknown_model_gets_openais_404(server: Server, path: str, model: str) -> None:
    body = {"model": model, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["type"] == "NotFoundError"
    assert error["param"] == "model"
    assert "does not exist" in error["message"]


def test_the_client_raises_its_own_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'sql'"):
        client.completions.create(model="sqll", prompt="x")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_no_request_can_load_or_unload_an_adapter(server: Server, path: str) -> None:
    body = {"lora_name": "sql", "lora_path": "/etc"}
    assert httpx.post(server.url + path, json=body).status_code == 404


def test_a_path_forges_no_line_of_the_log(server: Server) -> None:
    sent = httpx.post(f"{server.url}/v1/responses/x%0aforged%1b[2J/cancel")
    assert sent.status_code == 404
    found: list[dict[str, Any]] = []
    while not found:
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        found = [line for line in lines if line.get("request_id") == sent.headers["x-request-id"]]
    assert found[0]["path"] == r"/v1/responses/x\nforged\x1b[2J/cancel"
    assert all(value.isprintable() for value in found[0].values() if isinstance(value, str))


def test_the_base_answers_as_itself_while_every_adapter_is_busy(client: openai.OpenAI) -> None:
    """The stock CPU path gives such requests the last slot's adapter. All four models fill every batch here."""
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    base = AutoModelForCausalLM.from_pretrained(demo.BASE).eval()
    asked = [
        (model, row)
        for rows in zip(*(tasks.rows(t, test=True, n=8) for t in TASKS), strict=True)
        for task, row in zip(TASKS, rows, strict=True)
        for model in ("base", task)
    ]

    def ask(pair: tuple[str, tasks.Row]) -> list[int]:
        model, row = pair
        answer = client.completions.create(
            model=model,
            prompt=tokenizer(question(row, tokenizer))["input_ids"],
            max_tokens=16,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return answer.choices[0].model_extra["token_ids"]

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for (model, row), served in zip(asked, answers, strict=True):
        if model == "base":
            assert_greedy(base, tokenizer(question(row, tokenizer))["input_ids"], served)


def test_mixed_requests_at_once_each_get_their_own_adapters_answer(client: openai.OpenAI) -> None:
    asked = [
        (task, row)
        for group in zip(*(tasks.rows(t, test=True, n=10) for t in TASKS), strict=True)
        for task, row in zip(TASKS, group, strict=True)
    ]
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda pair: demo.ask(client, *pair), asked))
    hits = [answer == demo.expected(row) for (_, row), answer in zip(asked, answers, strict=True)]
    assert sum(hits) > demo.ADAPTER_AT_LEAST * len(hits)
