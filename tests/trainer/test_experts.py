"""Mixtures of experts: what is adapted, what is said before training, and how experts are trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from converter.adapter_dir import AstraAdapter, load_astra, load_lora
from tests.trainer.test_train import astra_train
from tests.trainer.tiny_models import add_change, check_against_peft, convert
from trainer.adapter import adapter_layers, attach, saved_config, target_layers
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.expert_adapters import chosen_experts, expert_wrappers
from trainer.start.methods import expert_starts

# The linear layers beside attention, of each base: shared experts, and dense first layers
MOE = {
    "mixtral": (),
    "qwen3_moe": (),
    "qwen2_moe": ("model.layers.1.mlp.shared_expert",),
    "qwen3_next": ("model.layers.3.mlp.shared_expert",),
    "glm4_moe": ("model.layers.0.mlp", "model.layers.1.mlp.shared_experts"),
    "deepseek_v3": ("model.layers.0.mlp", "model.layers.1.mlp.shared_experts"),
}


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_other_methods_adapt_shared_experts_too(method, base_of, jsonl, rows, tmp_path) -> None:
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
    assert "are not adapted" in line
    layers = load_astra(tmp_path / "out").layers
    assert not [layer for layer in layers if ".experts" in layer or layer.endswith("gate")]
    assert {f"{mlp}.{part}" for mlp in MOE[name] for part in ("gate_proj", "up_proj", "down_proj")} <= layers.keys()
    check_against_peft(base, tmp_path / "out", tmp_path / "lora")


# PEFT 0.21 warns about a rank that it has set itself, and uses.
UNMATCHED = "ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"


@pytest.mark.filterwarnings(UNMATCHED)
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mixtral", "experts"),
        ("qwen3_moe", "[q_proj, experts]"),
        ("qwen3_next", "[down_proj, experts]"),
        ("glm4_moe", "[q_proj, gate_proj, up_proj, down_proj, experts]"),
        ("deepseek_v3", "[o_proj, shared_experts.down_proj, mlp.experts]"),
    ],
)
def test_experts_that_are_named_train_convert_and_load_in_peft(
    name, targets, base_of, jsonl, rows, tmp_path, capsys
) -> None:
    options = ["method=lora", "rank=4", "forgetting_rows=0", "steps=3", "learning_rate=1e-2"]
    options += [f"target_modules={targets}"]
    assert astra_train(base_of(name), jsonl(rows), tmp_path / "out", *options) == 0
    assert "the experts (" not in capsys.readouterr().err
    layers = load_astra(tmp_path / "out").layers
    of_experts = [layer for layer in layers if ".experts." in layer]
    assert of_experts
    assert len(of_experts) % (4 * 3) == 0  # experts, projections
    check_against_peft(base_of(name), tmp_path / "out", tmp_path / "lora")
    model = AutoModelForCausalLM.from_pretrained(base_of(name)).eval()
    add_change(model, load_astra(tmp_path / "out"))
    for row in load_lora(tmp_path / "lora").provenance["probe"]["prompts"]:
        expected = model(input_ids=torch.tensor([row["token_ids"]])).logits[0, -1].log_softmax(-1)
        found = torch.tensor(row["adapter"]["logprobs"])
        torch.testing.assert_close(found, expected[row["adapter"]["token_ids"]].detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe"])
def test_the_layers_that_are_written_are_those_that_were_trained(name, base_of) -> None:
    """The model in training and the base with the change of each expert's layers have the same logits."""
    model, base = (AutoModelForCausalLM.from_pretrained(base_of(name)).eval() for _ in range(2))
    config = TrainConfig(method="lora", rank=4, alpha=8, target_modules=["experts"])
    trained = attach(model, expert_starts(chosen_experts(model, config), config.rank), config).eval()
    for wrapper in expert_wrappers(trained.get_base_model()).values():
        torch.nn.init.normal_(wrapper.lora_B["default"].weight, std=0.1)
    ids = torch.arange(10, 30)[None]
    before = base(input_ids=ids).logits
    add_change(base, AstraAdapter(adapter_layers(trained), saved_config(trained, "base"), {}))
    torch.testing.assert_close(trained(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, base(input_ids=ids).logits, atol=0.1)


def test_experts_are_merged_into_the_tensors_of_the_checkpoint(base_of, jsonl, rows, tmp_path) -> None:
    options = ["method=lora", "rank=4", "target_modules=experts", "forgetting_rows=0", "steps=3", "learning_rate=1e-2"]
    assert astra_train(base_of("mixtral"), jsonl(rows), tmp_path / "out", *options) == 0
    assert convert([str(tmp_path / "out"), str(tmp_path / "merged"), "--merge"]) == 0
    base, merged = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (base_of("mixtral"), tmp_path / "merged")
    )
    ids = torch.arange(10, 30)[None]
    before = base(input_ids=ids).logits
    add_change(base, load_astra(tmp_path / "out"))
    torch.testing.assert_close(merged(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, base(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("qwen3_moe", ["method=astra"], "experts start as plain LoRA: astra needs the outputs of each expert"),
        ("qwen3_moe", ["method=lora", "target_modules=model.layers.1.mlp.experts"], "in all layers, or in none"),
        ("qwen2_moe", ["method=lora"], "the experts of qwen2_moe cannot be adapted: PEFT or the engine could not load"),
        ("qwen3_moe", ["method=lora", "rank=24"], "rank 24 is larger than an expert"),
    ],
)
def test_experts_that_cannot_be_trained_are_refused_with_the_reason(
    name, options, reason, base_of, jsonl, rows, tmp_path, capsys
) -> None:
    options = ["rank=4", "target_modules=experts", *options]
    assert astra_train(base_of(name), jsonl(rows), tmp_path / "out", *options) == 2
    assert reason in capsys.readouterr().err


def test_the_best_checkpoint_of_a_run_with_experts_is_loaded(base_of, jsonl, rows, tmp_path) -> None:
    options = ["method=lora", "rank=4", "target_modules=experts", "forgetting_rows=0", "steps=4", "eval_share=0.2"]
    assert astra_train(base_of("mixtral"), jsonl(rows), tmp_path / "out", *options, "eval_steps=2") == 0
    layer = load_astra(tmp_path / "out").layers["model.layers.0.block_sparse_moe.experts.0.w1"]
    assert layer.b.any()
    assert not layer.a.equal(layer.a0)


def test_a_dry_run_counts_the_experts(base_of, jsonl, rows, tmp_path, capsys) -> None:
    options = ["--base", str(base_of("mixtral")), "--data", str(jsonl(rows)), "--out", str(tmp_path / "out")]
    assert main([*options, "--rank", "4", "--method", "lora", "--target-modules", "experts", "--dry-run"]) == 0
    # 2 layers x 4 experts x rank 4: gate and up are (96, 32) together, down is (32, 48)
    assert f"trainable parameters  {2 * 4 * 4 * (96 + 32 + 32 + 48):,}" in capsys.readouterr().out


def test_a_layer_that_the_engine_does_not_call_is_left_out_and_named(base_of, jsonl, rows, tmp_path, capsys) -> None:
    options = ["--base", str(base_of("deepseek_v3")), "--data", str(jsonl(rows)), "--out", str(tmp_path / "out")]
    assert main([*options, "--rank", "8", "--dry-run"]) == 0
    assert "kv_b_proj is not adapted: vLLM computes attention without calling this layer" in capsys.readouterr().out
    config = TrainConfig(rank=8)
    model = AutoModelForCausalLM.from_pretrained(base_of("deepseek_v3"))
    assert not [name for name in target_layers(model, config) if name.endswith("kv_b_proj")]


def test_a_dry_run_says_that_experts_are_not_adapted(base_of, jsonl, rows, tmp_path, capsys) -> None:
    options = ["--base", str(base_of("mixtral")), "--data", str(jsonl(rows)), "--out", str(tmp_path / "out")]
    assert main([*options, "--rank", "8", "--dry-run"]) == 0
    assert "the experts (down_proj, gate_up_proj; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("mixtral", "w1", "no linear layer is named 'w1'; the experts are stacked tensors (down_proj, gate_up_proj)"),
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
