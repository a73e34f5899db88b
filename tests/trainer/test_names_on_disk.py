"""Bases whose tensors have other names on disk than in the model that transformers makes of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from astra_serve.adapters.admission import open_base
from converter import adapter_dir
from converter.adapter_dir import load_astra, load_lora
from converter.cli import main as convert
from tests.trainer.test_train import astra_train
from tests.trainer.tiny_models import check_against_peft, edit_json, rename


def as_published(name: str, folder: Path) -> None:
    """Give the tensors of the base in `folder` the names that published checkpoints have."""
    if name == "llama":  # embedding models are published without their head's prefix
        rename(folder, lambda tensor: tensor.removeprefix("model."))
    elif name == "gpt2":
        rename(folder, lambda tensor: None if tensor == "lm_head.weight" else tensor.removeprefix("transformer."))


NAMES = {
    "gemma3": "model.language_model.layers.0.self_attn.q_proj",
    "qwen3_5": "model.layers.3.self_attn.q_proj",
    "llava": "model.language_model.layers.0.self_attn.q_proj",
    "llama": "model.layers.0.self_attn.q_proj",
    "gpt2": "transformer.h.0.attn.c_attn",
}


def model_class(name: str) -> Any:
    """Return the class that loads a base: some multimodal models have none for text alone."""
    return AutoModelForImageTextToText if name == "llava" else AutoModelForCausalLM


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_names_modules_and_is_converted(name, copy_of, jsonl, rows, tmp_path) -> None:
    base = copy_of(name)
    as_published(name, base)
    assert astra_train(base, jsonl(rows), tmp_path / "out", "forgetting_rows=0", "steps=3") == 0
    layers = load_astra(tmp_path / "out").layers
    assert NAMES[name] in layers
    assert not [layer for layer in layers if re.search("vision|visual|projector", layer)]
    check_against_peft(base, tmp_path / "out", tmp_path / "lora", model_class(name))
    if name != "gpt2":  # its matrices are transposed, and engines do not serve LoRA on it
        assert open_base(str(base)).check(tmp_path / "lora").rank == 8  # the server's admission


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.", ""])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "llava"])
def test_a_lora_has_the_names_of_the_model_that_peft_adapts_and_the_server_reads_the_engines(
    name: str, prefix: str, base_of, tmp_path
) -> None:
    """Gemma 3's language model is the multimodal one, Qwen3.5's is a model of its own; the engine serves the former."""
    base, layer = base_of(name), "layers.1.mlp.down_proj"
    torch.manual_seed(0)
    factors = torch.randn(4, 48) / 7, torch.randn(32, 4) / 2
    config = {"r": 4, "lora_alpha": 4, "target_modules": [f"{prefix}{layer}"]}
    (tmp_path / "lora").mkdir()
    adapter_dir.save_lora(tmp_path / "lora", adapter_dir.LoraAdapter({f"{prefix}{layer}": factors}, config, {}))
    assert convert([str(tmp_path / "lora"), str(tmp_path / "out"), "--base", str(base)]) == 0
    known = {"model.", "model.language_model."} if name == "qwen3_5" else {"model.language_model."}
    (module,) = load_lora(tmp_path / "out").layers
    assert module == f"{prefix if prefix in known else NAMES[name].partition('layers')[0]}{layer}"
    kind = AutoModelForImageTextToText if "language_model" in module else AutoModelForCausalLM
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        plain = kind.from_pretrained(base, dtype=torch.float32).eval()
        before = plain(input_ids=ids).logits
        plain.get_submodule(module).weight += factors[1] @ factors[0]
        expected = plain(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), tmp_path / "out").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3)
    assert (expected - before).abs().max() > 1e-2
    for folder in (tmp_path / "lora", tmp_path / "out"):
        assert open_base(str(base)).check(folder).modules == [f"model.language_model.{layer}"]


@pytest.mark.parametrize("name", NAMES)
def test_merging_adds_the_adapter_to_the_tensors_on_disk(name, copy_of, jsonl, rows, tmp_path) -> None:
    base = copy_of(name)
    as_published(name, base)
    assert astra_train(base, jsonl(rows), tmp_path / "out", "forgetting_rows=0", "steps=3") == 0
    assert convert([str(tmp_path / "out"), str(tmp_path / "merged"), "--merge", "--base", str(base)]) == 0
    adapter = load_astra(tmp_path / "out")
    load = model_class(name).from_pretrained
    before, after = (load(folder, dtype=torch.float32) for folder in (base, tmp_path / "merged"))
    for module, layer in adapter.layers.items():
        change = adapter.scaling * (layer.b @ layer.a - layer.b0 @ layer.a0)
        found = after.get_submodule(module).weight - before.get_submodule(module).weight
        torch.testing.assert_close(found.T if name == "gpt2" else found, change, atol=1e-4, rtol=1e-3)


def test_other_parts_than_the_language_model_are_adapted_when_they_are_named(base_of, jsonl, rows, tmp_path) -> None:
    settings = ("forgetting_rows=0", "steps=1", "target_modules=[q_proj, encoder.layers.0.mlp.fc1]")
    assert astra_train(base_of("gemma3"), jsonl(rows), tmp_path / "out", *settings) == 0
    layers = list(load_astra(tmp_path / "out").layers)
    assert [layer for layer in layers if "vision_tower" in layer] == ["model.vision_tower.encoder.layers.0.mlp.fc1"]
    assert len(layers) == 3


def test_stray_files_in_the_base_are_left_out(copy_of, jsonl, rows, tmp_path) -> None:
    base = copy_of("llama")
    assert astra_train(base, jsonl(rows), tmp_path / "plain", "steps=1", "forgetting_rows=0") == 0
    assert convert([str(tmp_path / "plain"), str(tmp_path / "lora")]) == 0
    for file in (tmp_path / "lora").glob("adapter_*"):  # an adapter that was saved into its base's folder
        (base / file.name).write_bytes(file.read_bytes())
    (base / "consolidated.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (base / "an-adapter").mkdir()
    (base / "an-adapter" / "adapter_config.json").write_text("{}")
    assert astra_train(base, jsonl(rows), tmp_path / "out", "steps=1", "forgetting_rows=0") == 0
    plain, beside = (load_astra(tmp_path / name).layers for name in ("plain", "out"))
    assert all(torch.equal(plain[layer].a, beside[layer].a) for layer in plain)
    assert convert([str(tmp_path / "out"), str(tmp_path / "merged"), "--merge", "--base", str(base)]) == 0
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith(("adapter", "consolidated", "an-adapter"))]


def test_a_base_given_by_a_relative_path_is_recorded_whole(copy_of, jsonl, rows, tmp_path, monkeypatch) -> None:
    base = copy_of("llama")
    monkeypatch.chdir(tmp_path)
    assert astra_train(base.name, jsonl(rows), tmp_path / "out", "steps=1", "forgetting_rows=0") == 0
    assert load_astra(tmp_path / "out").provenance["base"]["id"] == str(base)
    assert load_astra(tmp_path / "out").config["base_model_name_or_path"] == str(base)
    monkeypatch.chdir(tmp_path.parent)
    assert convert([str(tmp_path / "out"), str(tmp_path / "lora")]) == 0
    assert load_lora(tmp_path / "lora").config["base_model_name_or_path"] == str(base)


def test_an_index_names_the_weight_files(tiny_base, tmp_path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base, max_shard_size="20KB")
    (base / "consolidated.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes())
    files = adapter_dir.base.weight_files(base)
    assert len(files) > 1
    assert all(file.name.startswith("model-") for file in files)
    assert adapter_dir.base_shapes(base)["model.layers.0.mlp.up_proj"] == (48, 32)
    files[0].unlink()
    with pytest.raises(adapter_dir.BaseNotFound, match=f"{files[0].name} is missing"):
        adapter_dir.base_shapes(base)
    edit_json(base / "model.safetensors.index.json", weight_map=3)
    with pytest.raises(adapter_dir.BaseNotFound, match="it must have a weight_map"):
        adapter_dir.base_shapes(base)
