"""Adapters as other tools write them, and prompts of training rows, on the real engine in float32.

Over HTTP, the log probabilities of each adapter are those of PEFT, and the ids of a prompt are those of astra-train.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.converter.foreign import CONFIGS, EDITS, IDS, WEIGHTS, edit_config, into_checkpoint, lora, trained
from tests.support.prompts import learned
from tests.support.server import BIN, Server, astra_serve, free_port
from tests.trainer.data.test_tokens import sentencepiece

pytestmark = pytest.mark.timeout(400)
CLOSE = 1e-4  # nats: both compute in float32
APART = 0.02  # nats: the least effect of an adapter on its likeliest tokens
ADMIN = "the-admin"
OUTPUT_LAYER = ("the output layer", "the output layer without its copy")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' if m.role == 'user' }}{{ m.content }}"
    "{{ ']' if m.role == 'user' else eos_token }}{% endfor %}"
)


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[next(iter(tensors))][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_changed_embedding(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(420, 64)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# What is refused: the edit of a saved adapter, and what the line says beside the source.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another-kind": (lambda folder: edit_config(folder, peft_type="LOHA"), "is a tensor of a LORA"),
    "dora": (lambda folder: edit_config(folder, use_dora=True), "convert it: astra-convert"),
    "pissa": (lambda folder: edit_config(folder, init_lora_weights="pissa"), "--initial DIR"),
    "nan": (with_nan, "layers.0"),
    "embedding": (with_changed_embedding, "'model.embed_tokens.weight' is no copy of the base's tensor"),
    "checkpoint": (into_checkpoint, "checkpoint-500"),
    "pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "--allow-pickle"),
}


@dataclass(frozen=True)
class Running:
    """A server, its base, and the log probabilities (6, vocabulary) after IDS by PEFT, by the names of its adapters."""

    server: Server
    admin: str
    base: Path
    expected: dict[str, torch.Tensor]


def write_base(folder: Path, words: PreTrainedTokenizerFast, *, tied: bool) -> Path:
    """Write a Llama of random weights in float32; the engine's attention needs heads of 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def of_last(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].log_softmax(-1)


def adapters(base: Path, folder: Path, *, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Write an adapter of each kind that is served; yield its name and what PEFT computes with it."""
    logits = of_last(trained(base, folder / "nothing", lora()))
    for number, edit in enumerate(EDITS if tied else ["nothing"]):
        copy = folder / f"edit-{number}"
        shutil.copytree(folder / "nothing", copy)
        EDITS[edit](copy)
        yield copy.name, logits
    for number, name in enumerate(CONFIGS if tied else OUTPUT_LAYER):
        settings, save = CONFIGS[name]
        yield f"config-{number}", of_last(trained(base, folder / f"config-{number}", lora(**settings), **save))


@pytest.fixture(scope="module", params=["tied", "untied"])
def running(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A base with a tokenizer like SentencePiece's, whose output layer is tied to the embedding or not."""
    folder, tied = tmp_path_factory.mktemp(request.param), request.param == "tied"
    words = sentencepiece("normalizer" if tied else "pre_tokenizer")
    words.chat_template = TEMPLATE
    base = write_base(folder / "base", words, tied=tied)
    expected = dict(adapters(base, folder, tied=tied))
    with torch.no_grad():
        expected["base"] = of_last(AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits)
    names = [name for name in expected if name != "base"]
    document, port = folder / "adapters.yaml", free_port()
    document.write_text(
        "adapters:\n" + "".join(f"- {{name: {name}, source: ./{name}, required: true}}\n" for name in names)
    )
    options = ["--base", str(base), "--adapters", str(document), "--admin-port", str(port)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTRA_ADMIN_TOKEN", ADMIN)
        with astra_serve([*options, "--enforce-eager", "--dtype", "float32"], folder / "log") as server:
            while (ready := httpx.get(f"{server.url}/readyz", timeout=60)).status_code == 503:
                assert server.process.poll() is None
                assert "failed" not in ready.text, ready.text
                time.sleep(0.2)
            yield Running(server, f"http://127.0.0.1:{port}", base, expected)


def command(running: Running, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `astra-serve adapters` with these words."""
    line = [str(BIN / "astra-serve"), "adapters", "--url", running.admin, *words]
    environment = {**os.environ, "ASTRA_ADMIN_TOKEN": ADMIN}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=120)


def post(running: Running, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{running.server.url}{path}", json=body, timeout=60)
    assert answer.is_success, answer.text
    return answer.json()


def test_every_kind_is_served_with_the_log_probabilities_of_peft(running: Running) -> None:
    states = {one["name"]: one["state"] for one in json.loads(command(running, "list", "--json").stdout)["adapters"]}
    assert states == dict.fromkeys((name for name in running.expected if name != "base"), "serving")
    for name, expected in running.expected.items():
        body = {"model": name, "prompt": IDS.tolist(), "max_tokens": 1, "logprobs": 20, "temperature": 0}
        choices = post(running, "/v1/completions", {**body, "return_tokens_as_token_ids": True})["choices"]
        apart = 0.0
        for choice in choices:
            (found,) = choice["logprobs"]["top_logprobs"]
            ids = [int(key.removeprefix("token_id:")) for key in found]
            assert len(ids) >= 20
            served = torch.tensor([*found.values()])
            off = served - expected[choice["index"]][ids]
            assert off.abs().max() < CLOSE, name
            apart = max(apart, float((served - running.expected["base"][choice["index"]][ids]).abs().max()))
        assert (apart > APART) == (name != "base"), name


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_named_by_its_source_with_the_reason(running: Running, tmp_path: Path, kind: str) -> None:
    edit, reason = REFUSED[kind]
    shutil.copytree(running.base.parent / "nothing", tmp_path / kind)
    edit(tmp_path / kind)
    done = command(running, "publish", kind, str(tmp_path / kind))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert str(tmp_path / kind) in line
    assert reason in line
    assert "staging" not in line


ROWS = [
    {"prompt": "Answer with the code only.\nCode:\n", "completion": "SELECT a"},
    {"prompt": "Code:", "completion": " SELECT a"},
    {"prompt": "Is it good? [", "completion": "yes]"},
    {"prompt": "Is it good? ", "completion": "yes"},
    {"prompt": "Is it go", "completion": "od?"},
    {"prompt": "yes", "completion": "\u00e9\u263a no"},
]


@pytest.mark.parametrize("row", ROWS)
def test_the_prompt_of_a_row_has_the_ids_that_the_server_makes_of_it(running: Running, row: dict[str, str]) -> None:
    words = PreTrainedTokenizerFast.from_pretrained(running.base)
    prompt, ids = learned(row, words)
    assert post(running, "/tokenize", {"model": "base", "prompt": row["prompt"]})["tokens"] == prompt
    body = {"model": "base", "prompt": row["prompt"], "max_tokens": 1, "return_token_ids": True}
    assert post(running, "/v1/completions", body)["choices"][0]["prompt_token_ids"] == prompt
    assert words.decode(ids, skip_special_tokens=True) == row["prompt"] + row["completion"]


@pytest.mark.parametrize("row", ROWS)
def test_the_prompt_of_a_chat_has_the_ids_that_the_server_makes_of_it(running: Running, row: dict[str, str]) -> None:
    words = PreTrainedTokenizerFast.from_pretrained(running.base)
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    prompt, ids = learned({"messages": messages}, words)
    assert post(running, "/tokenize", {"model": "base", "messages": messages[:1]})["tokens"] == prompt
    body = {"model": "base", "messages": messages[:1], "max_completion_tokens": 1, "return_token_ids": True}
    assert post(running, "/v1/chat/completions", body)["prompt_token_ids"] == prompt
    whole = words.apply_chat_template(messages, tokenize=False)
    assert words.decode(ids).replace("<s> ", "<s>") == whole
