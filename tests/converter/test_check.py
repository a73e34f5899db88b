"""Verification: a LoRA is read back and compared with its source before it appears at the output path."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from converter import adapter_dir
from converter.adapter_dir import AstraAdapter, AstraLayer, LoraAdapter
from converter.check_factors import VerificationFailed, check_factors
from converter.check_model import DEFAULT_PROMPTS, Comparison
from converter.cli import main
from converter.delta import delta_weight
from converter.stored import choose_rank
from tests.converter.handmade import make_adapter, make_layer, source_of, to_lora

SHAPES = {"q_proj": (32, 32), "v_proj": (16, 32)}


@pytest.fixture
def adapter(tiny_base: Path) -> AstraAdapter:
    """An adapter for the attention layers of the tiny base; training changed its factors by 30 %."""
    names = adapter_dir.base_shapes(tiny_base)
    layers = {
        name: make_layer(*shape, 4, 0.3, seed=i) for i, (name, shape) in enumerate(names.items()) if "self_attn" in name
    }
    found = make_adapter(layers)
    found.provenance["base"] = {"id": str(tiny_base), "digest": adapter_dir.base_digest(tiny_base), "dtype": "float32"}
    return found


@pytest.fixture
def folder(adapter: AstraAdapter, tmp_path: Path) -> Path:
    with adapter_dir.new_folder(tmp_path / "astra") as new:
        adapter_dir.save_astra(new, adapter)
    return tmp_path / "astra"


def check(adapter: AstraAdapter, lora: LoraAdapter, dtype: torch.dtype = torch.bfloat16) -> float:
    source = source_of(adapter)
    return check_factors(source, lora, choose_rank(source), dtype, lambda: None).total


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0, 1e-6), (torch.bfloat16, 5e-4, 0.004)])
def test_the_estimated_error_of_the_factors_is_within_20_percent_of_the_exact_one(adapter, dtype, least, most) -> None:
    lora = to_lora(adapter, dtype)
    error, total = 0.0, 0.0
    for module, layer in adapter.layers.items():
        a, b = (t.double() for t in lora.layers[module])
        exact = delta_weight(layer, adapter.scaling)
        error, total = error + float((b @ a - exact).square().sum()), total + float(exact.square().sum())
    found = check(adapter, lora, dtype)
    assert least <= found <= most
    assert found == pytest.approx((error / total) ** 0.5, rel=0.2)


def swapped(lora: LoraAdapter) -> None:
    first, second = (name for name in lora.layers if name.endswith("q_proj"))
    lora.layers[first], lora.layers[second] = lora.layers[second], lora.layers[first]


def negated(lora: LoraAdapter) -> None:
    lora.layers.update({name: (a, -b) for name, (a, b) in lora.layers.items()})


def scaled(lora: LoraAdapter) -> None:
    lora.layers.update({name: (a, 1.02 * b) for name, (a, b) in lora.layers.items()})


def with_a_zero_column(lora: LoraAdapter) -> None:
    _, b = lora.layers[next(iter(lora.layers))]
    b[:, 0] = 0


@pytest.mark.parametrize("fault", [swapped, negated, scaled, with_a_zero_column])
def test_a_faulty_lora_is_detected_from_its_factors(adapter, fault) -> None:
    lora = to_lora(adapter, torch.bfloat16)
    fault(lora)
    with pytest.raises(VerificationFailed, match=r"at most 1\.0% is allowed"):
        check(adapter, lora)


def test_the_textbook_form_of_a_small_change_is_refused(adapter) -> None:
    small = {
        n: replace(x, a=x.a0 + 0.01 * (x.a - x.a0), b=x.b0 + 0.01 * (x.b - x.b0)) for n, x in adapter.layers.items()
    }
    adapter = replace(adapter, layers=small)
    lora = to_lora(adapter, torch.bfloat16)
    assert check(adapter, lora) < 0.004

    def concat(layer: AstraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([layer.a, layer.a0]).bfloat16(), torch.cat([layer.b, -layer.b0], dim=1).bfloat16()

    with pytest.raises(VerificationFailed):
        check(adapter, replace(lora, layers={name: concat(layer) for name, layer in small.items()}))


def test_the_error_of_compression_is_allowed_and_no_more(adapter) -> None:
    source = source_of(adapter)
    rank = choose_rank(source, 6)
    lora = to_lora(adapter, torch.bfloat16, rank=6)
    total = check_factors(source, lora, rank, torch.bfloat16, lambda: None).total
    assert total == pytest.approx(rank.total_dropped**0.5, rel=0.3)
    worse = to_lora(adapter, torch.bfloat16, rank=1)
    with pytest.raises(VerificationFailed):
        check_factors(source, worse, rank, torch.bfloat16, lambda: None)


def test_factors_too_small_for_float16_are_refused(adapter, tmp_path: Path, capsys) -> None:
    tiny = {n: replace(x, a=x.a0 + 1e-8 * x.a, b=x.b0.clone()) for n, x in adapter.layers.items()}
    with adapter_dir.new_folder(tmp_path / "tiny") as new:
        adapter_dir.save_astra(new, replace(adapter, layers=tiny))
    assert main([str(tmp_path / "tiny"), str(tmp_path / "lora"), "--dtype", "float16"]) == 2
    assert "convert with --dtype float32 or bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_the_record_has_the_digests_and_the_comparison_of_the_models(folder: Path, tmp_path: Path) -> None:
    assert main([str(folder), str(tmp_path / "lora")]) == 0  # without --base: the adapter names a local folder
    written = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert written["verification"]["mean_kl"] < 1e-6
    assert written["verification"]["greedy_agreement"] == 1
    assert written["verification"]["effect"] > 1e-3
    assert written["digest"] == adapter_dir.lora_digest(tmp_path / "lora")
    assert written["source"]["digest"] == adapter_dir.astra_digest(folder)


def test_the_probe_has_the_next_tokens_of_peft(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert main([str(folder), str(tmp_path / "lora")]) == 0
    written = json.loads((tmp_path / "lora" / "astra.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    probes = written["probe"]["prompts"]
    assert [probe["prompt"] for probe in probes] == list(DEFAULT_PROMPTS)
    for name in ("base", "adapter"):
        model = base if name == "base" else PeftModel.from_pretrained(base, tmp_path / "lora")
        for probe in probes:
            assert probe["token_ids"] == tokenizer(probe["prompt"])["input_ids"]
            with torch.no_grad():
                top = model(input_ids=torch.tensor([probe["token_ids"]])).logits[0, -1].log_softmax(-1).topk(5)
            assert probe[name]["token_ids"] == top.indices.tolist()
            assert probe[name]["logprobs"] == pytest.approx(top.values.tolist(), abs=1e-3)
    assert any(probe["base"]["logprobs"] != probe["adapter"]["logprobs"] for probe in probes)


def test_nothing_is_written_if_the_served_model_differs_by_more_than_max_kl(
    folder: Path, tmp_path: Path, capsys
) -> None:
    assert main([str(folder), str(tmp_path / "lora"), "--rank", "1", "--max-kl", "0.0001"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nats per token (KL), above the limit of 0.0001" in line
    assert not (tmp_path / "lora").exists()
    assert main([str(folder), str(tmp_path / "lora"), "--rank", "1", "--max-kl", "10"]) == 0


def test_a_faulty_lora_is_detected_in_the_model(adapter, tiny_base: Path) -> None:
    lora = to_lora(adapter, torch.float32)
    comparison = Comparison(source_of(adapter), tiny_base, torch.float32, DEFAULT_PROMPTS)
    assert comparison.agreement(comparison.served(lora)).mean_kl < 1e-6
    negated(lora)
    assert comparison.agreement(comparison.served(lora)).mean_kl > 1e-3


def test_rank_auto_writes_the_smallest_rank_within_max_kl_and_records_what_it_tried(folder, tmp_path, capsys) -> None:
    def kl_at(rank: int) -> float:
        out = tmp_path / f"rank-{rank}"
        assert main([str(folder), str(out), "--rank", str(rank), "--max-kl", "10"]) == 0
        return json.loads((out / "astra.json").read_text())["verification"]["mean_kl"]

    kl = {rank: kl_at(rank) for rank in range(1, 9)}
    assert list(kl.values()) == sorted(kl.values(), reverse=True)
    for rank in (1, 3, 7):
        limit = (kl[rank] + kl[rank + 1]) / 2
        capsys.readouterr()
        assert main([str(folder), str(tmp_path / f"auto-{rank}"), "--rank", "auto", "--max-kl", str(limit)]) == 0
        written = json.loads((tmp_path / f"auto-{rank}" / "astra.json").read_text())
        assert written["rank"] == rank + 1
        assert {row["rank"]: row["mean_kl"] for row in written["tried"]}.items() <= kl.items()
        assert rank in {row["rank"] for row in written["tried"]}
        assert "ranks tried" in capsys.readouterr().out
    fitted = [str(folder), str(tmp_path / "fitted"), "--rank", "auto", "--fit-engine", "--max-kl", str(kl[3])]
    assert main(fitted) == 0
    assert json.loads((tmp_path / "fitted" / "astra.json").read_text())["rank"] == 8


def test_rank_auto_needs_the_comparison_of_the_models(folder, tmp_path, capsys) -> None:
    assert main([str(folder), str(tmp_path / "x"), "--rank", "auto", "--no-verify"]) == 2
    assert "--rank auto has to compare the models, but --no-verify was given" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_probe_uses_the_prompts_of_the_user(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def f(x):\\n\n\nhello\n")
    assert main([str(folder), str(tmp_path / "lora"), "--prompts", str(tmp_path / "prompts.txt")]) == 0
    written = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert [probe["prompt"] for probe in written["probe"]["prompts"]] == ["def f(x):\n", "hello"]


def test_an_empty_or_missing_file_of_prompts_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").write_text("\n")
    for file, message in (("empty", "has 0 prompts: give 1 to 64"), ("none", "cannot be read")):
        assert main([str(folder), str(tmp_path / "x"), "--prompts", str(tmp_path / file)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [((), "the base is not available locally: give --base"), (("--no-verify",), "--no-verify was given")],
)
def test_without_a_model_the_record_has_the_reason_and_the_errors_of_the_factors(
    adapter, tmp_path, options, reason
) -> None:
    adapter.provenance["base"]["id"] = "org/somewhere-else"
    with adapter_dir.new_folder(tmp_path / "astra") as new:
        adapter_dir.save_astra(new, adapter)
    assert main([str(tmp_path / "astra"), str(tmp_path / "lora"), *options]) == 0
    written = json.loads((tmp_path / "lora" / "astra.json").read_text())
    assert written["unverified"] == reason
    assert written["errors"]["relative"] < 1e-5
    assert "probe" not in written


def test_a_base_that_has_changed_since_training_is_refused(adapter, tmp_path: Path, capsys) -> None:
    adapter.provenance["base"]["digest"] = "sha256:" + 64 * "1"
    with adapter_dir.new_folder(tmp_path / "old") as new:
        adapter_dir.save_astra(new, adapter)
    assert main([str(tmp_path / "old"), str(tmp_path / "lora")]) == 2
    assert "was trained on another base" in capsys.readouterr().err


@pytest.fixture
def lora(folder: Path, tmp_path: Path, capsys) -> Path:
    """The converted adapter."""
    assert main([str(folder), str(tmp_path / "lora")]) == 0
    capsys.readouterr()
    return tmp_path / "lora"


def test_inspect_shows_kind_rank_digest_and_probe(folder: Path, lora: Path, capsys) -> None:
    assert main(["inspect", str(folder)]) == 0
    assert "Astra adapter of rank 4" in capsys.readouterr().out
    assert main(["inspect", str(lora)]) == 0
    shown = capsys.readouterr().out
    for part in ("LoRA of rank 8", "as recorded", "8 prompts"):
        assert part in shown


def test_inspect_prints_every_layer_as_json(lora: Path, capsys) -> None:
    assert main(["inspect", str(lora), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["digest_is_the_recorded_one"] is True
    assert found["layers"]["model.layers.0.self_attn.v_proj"] == {"d_out": 16, "d_in": 32, "rank": 8}


def test_inspect_detects_changed_bytes(lora: Path, capsys) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert main(["inspect", str(lora)]) == 0
    assert "NOT as recorded" in capsys.readouterr().out


def test_inspect_refuses_a_missing_folder(tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
