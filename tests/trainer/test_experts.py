"""Mixtures of experts: what is adapted, what is said before training, and why experts cannot be named."""

import pytest

from converter.adapter_dir import load_astra
from tests.trainer.test_train import astra_train
from tests.trainer.tiny_models import check_against_peft
from trainer.cli import main

MOE = ("mixtral", "qwen3_moe", "qwen2_moe", "qwen3_next", "glm4_moe", "deepseek_v3")


@pytest.mark.parametrize(
    ("name", "shared"),
    [("glm4_moe", "shared_experts"), ("deepseek_v3", "shared_experts"), ("qwen2_moe", "shared_expert")],
)
def test_dense_layers_and_shared_experts_are_adapted(name, shared, base_of, jsonl, rows, tmp_path) -> None:
    assert astra_train(base_of(name), jsonl(rows), tmp_path / "out", "rank=8", "forgetting_rows=0", "steps=1") == 0
    layers = load_astra(tmp_path / "out").layers
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.1.mlp.{shared}.{projection}" in layers
        if name != "qwen2_moe":
            assert f"model.layers.0.mlp.{projection}" in layers


@pytest.mark.parametrize("method", ["lora", "eva", "corda", "lora_ga"])
def test_other_methods_adapt_them_too(method, base_of, jsonl, rows, tmp_path) -> None:
    options = [f"method={method}", "rank=8", "forgetting_rows=0", "steps=2", "learning_rate=1e-2"]
    assert astra_train(base_of("glm4_moe"), jsonl(rows), tmp_path / "out", *options) == 0
    layer = load_astra(tmp_path / "out").layers["model.layers.1.mlp.shared_experts.gate_proj"]
    assert not layer.b.equal(layer.b0)


@pytest.mark.parametrize("name", MOE)
def test_a_mixture_of_experts_trains_converts_and_loads_in_peft(name, base_of, jsonl, rows, tmp_path, capsys) -> None:
    base = base_of(name)
    assert astra_train(base, jsonl(rows), tmp_path / "out", "rank=8", "forgetting_rows=0", "steps=3") == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("the experts ("))
    assert "down_proj" in line
    assert "are not adapted: they are stacked tensors" in line
    assert not [layer for layer in load_astra(tmp_path / "out").layers if ".experts" in layer or layer.endswith("gate")]
    check_against_peft(base, tmp_path / "out", tmp_path / "lora")


def test_a_dry_run_says_that_experts_are_not_adapted(base_of, jsonl, rows, tmp_path, capsys) -> None:
    options = ["--base", str(base_of("mixtral")), "--data", str(jsonl(rows)), "--out", str(tmp_path / "out")]
    assert main([*options, "--rank", "8", "--dry-run"]) == 0
    assert "the experts (down_proj, gate_up_proj; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("mixtral", "w1", "no linear layer is named 'w1'; the experts are stacked tensors (down_proj, gate_up_proj)"),
        ("mixtral", "experts", "the experts are stacked tensors"),
        ("mixtral", "experts.gate_up_proj", "the experts are stacked tensors"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.up_proj", "the experts are stacked tensors"),
        ("qwen3_5", "lm_head", "is the output head, which shares its weight with the embedding"),
        ("llama", "lm_head", "'lm_head' is the output head, which is not adapted"),
        ("llama", "embed_tokens", "'embed_tokens' is of type Embedding: name linear layers"),
        ("mamba", "out_proj", "PEFT does not support 'out_proj' in mamba"),
        ("llama", "mlp", "'mlp' is of type LlamaMLP: name linear layers"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_its_reason(
    name, target, reason, base_of, jsonl, rows, tmp_path, capsys
) -> None:
    options = ["--base", str(base_of(name)), "--data", str(jsonl(rows)), "--out", str(tmp_path / "out"), "--rank", "4"]
    for dry_run in (["--dry-run"], []):
        assert main([*options, "--target-modules", f"[{target}]", *dry_run]) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_layers_that_peft_does_not_support_are_left_out_and_named(base_of, jsonl, rows, tmp_path, capsys) -> None:
    assert astra_train(base_of("mamba"), jsonl(rows), tmp_path / "out", "forgetting_rows=0", "steps=1") == 0
    assert "out_proj are not adapted: PEFT does not support them" in capsys.readouterr().err


def test_a_gate_with_one_output_is_left_out_and_named(base_of, jsonl, rows, tmp_path, capsys) -> None:
    assert astra_train(base_of("qwen2_moe"), jsonl(rows), tmp_path / "out", "rank=16", "forgetting_rows=0") == 0
    assert (
        "layers that are too narrow for the rank are not adapted: shared_expert_gate (1, 32)" in capsys.readouterr().err
    )
