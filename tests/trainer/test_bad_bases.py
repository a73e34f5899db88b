"""Bases and rows that do not fit together: one line each, in a dry run as in the run, and nothing is left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from converter.adapter_dir import load_astra
from tests.trainer.test_train import FAST, astra_train
from tests.trainer.tiny_models import edit_json, rename, save_base
from trainer.cli import main

TEXT = [{"text": "some text"}] * 8
LONG = [{"text": "one two three four " * 60}] * 8
CODE = """from pathlib import Path
from transformers import LlamaConfig
Path("REMOTE_CODE_RAN").touch()
class TestConfig(LlamaConfig):
    model_type = "test"
"""
MODEL = """from transformers import LlamaForCausalLM
from .configuration_test import TestConfig
class TestModel(LlamaForCausalLM):
    config_class = TestConfig
"""


def without_a_tensor(base: Path) -> None:
    rename(base, lambda name: None if name == "model.layers.1.mlp.up_proj.weight" else name)


def with_another_vocabulary(base: Path) -> None:
    edit_json(base / "config.json", vocab_size=2000)


def with_a_broken_tokenizer(base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = [["a", "b", "c"]]
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def with_half_a_file(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_more_tokens(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<|newpad|>", "additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(base)


def with_its_own_code(base: Path) -> None:
    auto_map = {"AutoConfig": "configuration_test.TestConfig", "AutoModelForCausalLM": "modeling_test.TestModel"}
    edit_json(base / "config.json", auto_map=auto_map, model_type="test")
    (base / "configuration_test.py").write_text(CODE, encoding="utf-8")
    (base / "modeling_test.py").write_text(MODEL, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "damage", "rows", "settings", "message"),
    [
        ("llama", without_a_tensor, TEXT, (), "has no tensor for model.layers.1.mlp.up_proj.weight: download"),
        ("llama", with_another_vocabulary, TEXT, (), "on disk, but config.json says (2000, 32): correct config.json"),
        ("llama", with_a_broken_tokenizer, TEXT, (), "the tokenizer in"),
        ("llama", with_half_a_file, TEXT, (), "cannot be"),
        ("llama", with_more_tokens, [{"text": "call <tool> now"}] * 8, (), "contains the token '<tool>'"),
        ("llama", None, LONG, ("max_length=256",), "the base has 128 positions: set max_length to 128 or less"),
        ("opt", None, LONG, ("max_length=256",), "but the base has 128 positions"),
        ("llama", None, TEXT, ("max_length=256", "packing=true"), "a row of 256 tokens, but the base has 128"),
        ("bert", None, LONG, ("max_length=256", "task=classification"), "but the base has 128 positions"),
        ("roberta", None, LONG, ("max_length=128", "task=classification"), "positions: set max_length to 12"),
        ("llama", with_its_own_code, TEXT, (), "it needs Python code of its own: read that code, then set"),
    ],
)  # fmt: skip
def test_one_line_says_what_does_not_fit(
    name: str,
    damage: Callable[[Path], None] | None,
    rows: list[dict[str, Any]],
    settings: tuple[str, ...],
    message: str,
    copy_of,
    jsonl,
    tmp_path,
    capfd,
    monkeypatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = copy_of(name)
    if damage:
        damage(base)
    if "task=classification" in settings:
        rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
    options = [word for setting in (*FAST, *settings) for word in ("--set", setting)]
    options += ["--base", str(base), "--data", str(jsonl(rows)), "--out", str(tmp_path / "work" / "out")]
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    for dry_run in (["--dry-run"], []):
        assert main([*options, *dry_run]) == 2
        *_, line = capfd.readouterr().err.strip().splitlines()  # before it, how many rows are cut
        assert line.startswith("astra-train: ")
        assert message in line
        assert sorted(tmp_path.rglob("*")) == before


def test_remote_code_runs_only_when_it_is_allowed_and_that_is_recorded(copy_of, jsonl, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = copy_of("llama")
    with_its_own_code(base)
    settings = ("trust_remote_code=true", "forgetting_rows=0", "steps=1")
    assert astra_train(base, jsonl(TEXT), tmp_path / "out", *settings) == 0
    assert (tmp_path / "REMOTE_CODE_RAN").exists()
    assert load_astra(tmp_path / "out").provenance["config"]["trust_remote_code"] is True


def test_a_padding_token_without_an_embedding_is_not_used(copy_of, jsonl, rows, tmp_path) -> None:
    base = copy_of("llama")
    with_more_tokens(base)
    assert astra_train(base, jsonl(rows), tmp_path / "out", "steps=2") == 0


def test_a_classifier_of_other_labels_is_a_base_like_any_other(copy_of, jsonl, tmp_path) -> None:
    base = copy_of("roberta")
    tensors = load_file(base / "model.safetensors")
    extra = {"classifier.dense.weight": (32, 32), "classifier.dense.bias": (32,)}
    extra |= {"classifier.out_proj.weight": (5, 32), "classifier.out_proj.bias": (5,)}
    save_file(tensors | {name: torch.ones(shape) for name, shape in extra.items()}, base / "model.safetensors")
    data = jsonl([{"text": f"text {i}", "label": i % 2} for i in range(8)])
    settings = ("task=classification", "forgetting_rows=0", "steps=1")
    assert astra_train(base, data, tmp_path / "out", *settings) == 0
    assert load_astra(tmp_path / "out").head["classifier.out_proj.weight"].shape == (2, 32)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_forgetting_is_measured_on_every_language_model(name, base_of, jsonl, rows, tmp_path) -> None:
    assert astra_train(base_of(name), jsonl(rows), tmp_path / "out", "steps=2") == 0
    assert load_astra(tmp_path / "out").provenance["forgetting"]["before"] > 0


def test_a_held_out_row_that_is_too_long_is_of_its_own_file(base_of, jsonl, tmp_path, capfd) -> None:
    files = ["--data", str(jsonl(TEXT)), "--eval-data", str(jsonl(LONG, "held-out.jsonl"))]
    options = ["--base", str(base_of("llama")), "--out", str(tmp_path / "out"), "--max-length", "256", "--dry-run"]
    assert main([*options, *files]) == 2
    assert "held-out.jsonl has a row of" in capfd.readouterr().err


def test_forgetting_is_measured_within_few_positions(tokenizer, jsonl, rows, tmp_path) -> None:
    base = save_base("opt", tmp_path / "base", tokenizer, max_position_embeddings=48)
    assert astra_train(base, jsonl(rows), tmp_path / "out", "steps=1") == 0
