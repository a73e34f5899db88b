"""DoRA, LoHa and LoKr become the LoRA that is equal or nearest to them; other kinds are refused with their reason."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from converter import adapter_dir
from converter.adapter_dir import MalformedAdapter
from converter.cli import main
from tests.converter.foreign import (
    ATTENTION,
    IDS,
    WEIGHTS,
    by_peft,
    edit_config,
    lora,
    named,
    prefixed,
    replaced,
    trained,
)

SHARED = {"target_modules": [*ATTENTION, "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CONFIGS = {
    "dora": lora(use_dora=True),
    "dora with patterns": lora(
        use_dora=True, use_rslora=True, rank_pattern={"(q|k)_proj": 2}, alpha_pattern={"o.*": 9}
    ),
    "loha": LoHaConfig(r=2, alpha=3, **SHARED),
    "loha of full rank": LoHaConfig(r=8, alpha=3, **SHARED),
    "loha with patterns": LoHaConfig(r=2, alpha=3, rank_pattern={"up_.*": 3}, alpha_pattern={"q_proj": 7}, **SHARED),
    "lokr": LoKrConfig(r=2, alpha=3, **SHARED),
    "lokr of whole matrices": LoKrConfig(r=32, alpha=3, **SHARED),
    "lokr of four factors": LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4, **SHARED),
}


def convert(folder: Path, out: Path, *options: object) -> int:
    return main([str(folder), str(out), *map(str, options)])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exact_lora_equals_the_adapter(tiny_base: Path, tmp_path: Path, name: str) -> None:
    expected = trained(tiny_base, tmp_path / "adapter", CONFIGS[name])
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--base", tiny_base) == 0
    torch.testing.assert_close(by_peft(tiny_base, tmp_path / "lora"), expected, rtol=1e-3, atol=1e-4)
    record = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert record["source"]["kind"] == name.partition(" ")[0]
    assert record["errors"]["relative"] < 1e-5
    assert record["verification"]["mean_kl"] < 1e-6
    assert adapter_dir.is_plainly_written(tmp_path / "lora")


@pytest.mark.parametrize("name", ["dora", "loha", "lokr"])
@pytest.mark.parametrize("edit", [named("default"), prefixed(""), replaced("model.layers", "language_model.layers")])
def test_names_are_read_as_those_of_a_lora(tiny_base: Path, tmp_path: Path, name: str, edit) -> None:
    expected = trained(tiny_base, tmp_path / "adapter", CONFIGS[name])
    edit(tmp_path / "adapter")
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--base", tiny_base, "--no-verify") == 0
    torch.testing.assert_close(by_peft(tiny_base, tmp_path / "lora"), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["dora", "loha of full rank", "lokr of whole matrices"])
def test_a_smaller_rank_has_its_loss_stated(tiny_base: Path, tmp_path: Path, capsys, name: str) -> None:
    trained(tiny_base, tmp_path / "adapter", CONFIGS[name])
    options = ("--base", tiny_base, "--rank", 4, "--max-kl", 100)
    assert convert(tmp_path / "adapter", tmp_path / "lora", *options) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert record["rank"] == 4
    assert 0 < record["errors"]["dropped_energy"] < 1
    assert f"relative error of delta W: {record['errors']['relative']:.2g}" in out
    assert "32 without compression" in out


def test_rank_auto_is_the_smallest_rank_that_max_kl_allows(tiny_base: Path, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "adapter", CONFIGS["dora"])
    options = ("--base", tiny_base, "--rank", "auto", "--max-kl", 0.001)
    assert convert(tmp_path / "adapter", tmp_path / "lora", *options) == 0
    record = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert record["verification"]["mean_kl"] <= 0.001
    assert 1 <= record["rank"] <= 32


def test_energy_chooses_a_rank(tiny_base: Path, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "adapter", CONFIGS["loha of full rank"])
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--base", tiny_base, "--energy", 0.5, "--max-kl", 100) == 0
    assert json.loads((tmp_path / "lora" / "astra.json").read_text())["rank"] < 32


def test_a_dora_needs_its_base_and_finds_the_recorded_one(tiny_base: Path, tmp_path: Path, capsys) -> None:
    trained(tiny_base, tmp_path / "adapter", CONFIGS["dora"])
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--no-verify") == 0  # the base of the config is local
    edit_config(tmp_path / "adapter", base_model_name_or_path="org/none")
    assert convert(tmp_path / "adapter", tmp_path / "none", "--no-verify") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "whose change of the weights depends on the base: give it with --base" in line


def test_a_dora_can_be_merged(tiny_base: Path, tmp_path: Path) -> None:
    expected = trained(tiny_base, tmp_path / "adapter", CONFIGS["dora"])
    assert convert(tmp_path / "adapter", tmp_path / "merged", "--base", tiny_base, "--merge") == 0
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_an_exact_rank_that_no_engine_serves_needs_a_choice(
    tiny_base: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    trained(tiny_base, tmp_path / "adapter", CONFIGS["dora"])
    monkeypatch.setattr("converter.convert.ENGINE_RANKS", (1, 8, 16))
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--base", tiny_base) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the exact LoRA has rank 32, and engines serve at most 16: give --rank K" in line


@pytest.mark.parametrize("name", ["dora", "loha", "lokr"])
def test_servers_refuse_them_with_the_command_that_converts_them(tiny_base: Path, tmp_path: Path, name: str) -> None:
    trained(tiny_base, tmp_path / "adapter", CONFIGS[name])
    for read in (adapter_dir.load_lora, adapter_dir.read_lora_header):
        with pytest.raises(MalformedAdapter, match=rf"astra-convert {tmp_path}/adapter OUT_DIR --base"):
            read(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("dora", "layers.1.self_attn.q_proj.lora_magnitude_vector", "has no lora_magnitude_vector of 32 numbers"),
        ("loha", "hada_w2_b", "needs four matrices"),
        ("lokr", "lokr_w1", "needs the matrix lokr_w1"),
    ],
)
def test_a_missing_part_is_refused(tiny_base: Path, tmp_path: Path, capsys, name: str, drop: str, message: str) -> None:
    trained(tiny_base, tmp_path / "adapter", CONFIGS[name])
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors[next(key for key in sorted(tensors) if drop in key)]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--base", tiny_base) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_a_type_that_is_not_that_of_the_tensors_is_refused(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    trained(tiny_base, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", peft_type=kind)
    with pytest.raises(MalformedAdapter, match=f"has peft_type='{kind}': .*, and .* is a tensor of a LORA"):
        adapter_dir.load_lora(tmp_path / "adapter")
    trained(tiny_base, tmp_path / "dora", CONFIGS["dora"])
    edit_config(tmp_path / "dora", use_dora=False)
    with pytest.raises(MalformedAdapter, match=r"has peft_type='LORA': .*, and .* is a tensor of a DORA"):
        adapter_dir.load_lora(tmp_path / "dora")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "multiplies activations by trained vectors"),
        (VeraConfig(r=4, target_modules=["q_proj"]), "share two random matrices"),
        (PrefixTuningConfig(num_virtual_tokens=2), "adds trained vectors to the keys and values of each layer"),
        (PromptTuningConfig(num_virtual_tokens=2), "adds trained vectors to the prompt's embeddings"),
        (OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]), "not a product of two small matrices"),
    ],
    ids=lambda value: getattr(value, "peft_type", ""),
)
def test_other_kinds_are_refused_with_their_reason(
    tiny_base: Path, tmp_path: Path, capsys, config, reason: str
) -> None:
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config).save_pretrained(tmp_path / "adapter")
    assert convert(tmp_path / "adapter", tmp_path / "lora", "--base", tiny_base) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert str(tmp_path / "adapter") in line
    with pytest.raises(MalformedAdapter, match=reason):
        adapter_dir.read_lora_header(tmp_path / "adapter")


def test_a_tied_output_layer_cannot_be_merged_and_the_line_says_why(tiny_base: Path, tmp_path: Path, capsys) -> None:
    trained(tiny_base, tmp_path / "lora", lora(target_modules=["lm_head"]), save_embedding_layers=False)
    assert convert(tmp_path / "lora", tmp_path / "merged", "--base", tiny_base, "--merge") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the output layer shares its weights with the embedding" in line
