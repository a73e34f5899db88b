"""`astra-train` on the tiny base: its output, its reproducibility and its errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from converter.adapter_dir import base_digest, load_astra
from converter.cli import main as convert
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.loop import learning_rate_factor

FAST = ("rank=4", "steps=6", "batch_size=4", "max_length=32", "calibration_rows=8", "learning_rate=1e-2")
FAST = (*FAST, "forgetting_rows=2")


def astra_train(base: Path | str, data: Path, out: Path, *settings: str) -> int:
    options = [word for setting in (*FAST, *settings) for word in ("--set", setting)]
    return main(["--base", str(base), "--data", str(data), "--out", str(out), *options])


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_writes_a_complete_adapter_folder(tiny_base, jsonl, rows, tmp_path) -> None:
    data = jsonl(rows)
    assert astra_train(tiny_base, data, tmp_path / "out", "alpha=8") == 0
    assert set(files(tmp_path / "out")) == {
        "astra_weights.safetensors",
        "adapter_config.json",
        "astra.json",
        "README.md",
        "loss.jsonl",
        "loss.png",
        "spectra.safetensors",
    }
    adapter = load_astra(tmp_path / "out")
    assert len(adapter.layers) == 14
    assert adapter.scaling == 2.0
    assert adapter.config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    origin = adapter.provenance
    assert origin["base"] == {"id": str(tiny_base), "digest": base_digest(tiny_base), "dtype": "float32"}
    assert (origin["data"]["file"], origin["data"]["rows"]) == (data.name, len(rows))
    assert origin["data"]["digest"].startswith("sha256:")
    assert origin["config"]["steps"] == 6
    assert set(origin["spectra"]) == set(adapter.layers)
    assert {"python", "torch", "transformers", "peft", "astra-serve"} <= set(origin["versions"])
    points = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_template_and_the_defaults_of_a_run_are_written_where_they_are_not_the_bases(
    tiny_base, jsonl, tmp_path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "generation_config.json").write_text('{"top_k": 5, "eos_token_id": 1}')
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    data = jsonl([{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}] * 8)
    settings = ("steps=1", "forgetting_rows=0", "spectra=false", f"chat_template={template}")
    defaults = "generation={top_k: 5, temperature: 0.5, eos_token_id: [1, 2]}"
    assert astra_train(base, data, tmp_path / "one", *settings, defaults) == 0
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == template.read_text()
    written = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert written == {"temperature": 0.5, "eos_token_id": [1, 2]}
    shutil.copy(template, base / "chat_template.jinja")
    assert astra_train(base, data, tmp_path / "two", *settings, "generation={top_k: 5}") == 0
    assert not {"chat_template.jinja", "generation_config.json"} & set(files(tmp_path / "two"))


def test_a_template_that_cannot_be_read_is_one_line(tiny_base, jsonl, rows, tmp_path, capsys) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", f"chat_template={tmp_path}/none") == 2
    assert "none cannot be read: " in capsys.readouterr().err


def test_training_lowers_the_loss_and_changes_every_layer(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "steps=60") == 0
    points = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert points[-1]["loss"] < points[0]["loss"] - 0.2
    for layer in load_astra(tmp_path / "out").layers.values():
        assert not torch.equal(layer.a, layer.a0)
        assert not torch.equal(layer.b, layer.b0)


def test_the_same_seed_gives_the_same_bytes(tiny_base, jsonl, rows, tmp_path) -> None:
    data = jsonl(rows)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert astra_train(tiny_base, data, tmp_path / name, f"seed={seed}") == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["astra_weights.safetensors"] != files(tmp_path / "c")["astra_weights.safetensors"]


@pytest.mark.parametrize("subspace", ["tail", "principal", "middle", "random"])
def test_every_subspace_trains(tiny_base, jsonl, rows, tmp_path, subspace: str) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", f"subspace={subspace}", "steps=2") == 0
    adapter = load_astra(tmp_path / "out")
    assert adapter.provenance["config"]["subspace"] == subspace
    spectrum = adapter.provenance["spectra"]["model.layers.1.mlp.down_proj"]  # 32 outputs, rank 4: an eighth
    low, high = {"tail": (0, 1e-3), "principal": (0.2, 1), "middle": (1e-3, 0.125), "random": (0.03, 0.3)}[subspace]
    assert low <= spectrum["subspace_energy_share"] <= high
    assert all(not torch.equal(layer.a, layer.a0) for layer in adapter.layers.values())


def test_a_small_calibration_memory_gives_the_same_adapter(tiny_base, jsonl, rows, tmp_path) -> None:
    data = jsonl(rows)
    assert astra_train(tiny_base, data, tmp_path / "one") == 0
    assert astra_train(tiny_base, data, tmp_path / "many", "calibration_memory=1KiB") == 0
    one, many = (load_astra(tmp_path / name).layers for name in ("one", "many"))
    assert all(torch.equal(one[name].a, many[name].a) for name in one)


def test_train_b_false_keeps_b(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "train_b=false") == 0
    assert all(torch.equal(layer.b, layer.b0) for layer in load_astra(tmp_path / "out").layers.values())


def test_the_tail_of_a_layer_with_more_outputs_than_inputs_has_a0_zero(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out") == 0
    adapter = load_astra(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"  # 48 outputs of 32 inputs
    assert adapter.provenance["spectra"][name]["null_directions"] >= 16
    assert adapter.layers[name].a0.abs().max() < 1e-5
    assert adapter.layers[name].a.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_base_can_be_frozen_in_another_dtype(tiny_base, jsonl, rows, tmp_path, dtype: str) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", f"dtype={dtype}") == 0
    assert load_astra(tmp_path / "out").provenance["base"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "./no/such/base"}, "base model './no/such/base' is not a folder"),
        ({"base": "EMPTY"}, "has no config.json"),
        ({"data": "missing.jsonl"}, "cannot be read"),
        ({"rows": [{"text": "fine"}, {"foo": 1}]}, "row 2: a row must be"),
        ({"rows": [{"prompt": "word " * 99, "completion": "x"}]}, "at least 32 tokens, the longest"),
        ({"rows": [{"messages": [{"role": "assistant", "content": "x"}]}]}, 'row 1: "messages" need a question'),
        ({"set": "rank=17"}, "rank 17 is larger than layer"),
        ({"set": "target_modules=[nothing]"}, "available: down_proj, gate_proj"),
        ({"set": "learning_rate=1e30"}, "lower learning_rate"),
        ({"set": "stepz=3"}, "the nearest name is 'steps'"),
        ({"set": "learning_rate=.inf"}, "finite"),
        ({"out": "EXISTS"}, "exists already"),
        ({"out": "UNDER_A_FILE"}, "cannot be made"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_bad_input_gives_one_line_and_status_2_and_writes_nothing(
    tiny_base, jsonl, rows, tmp_path, capsys, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    base = {"EMPTY": tmp_path / "empty"}.get(change.get("base", ""), change.get("base", tiny_base))
    data = tmp_path / change["data"] if "data" in change else jsonl(change.get("rows", rows))
    out = tmp_path / "work" / "out"
    if change.get("out") == "EXISTS":
        out.mkdir(parents=True)
    elif change.get("out") == "UNDER_A_FILE":
        (tmp_path / "work").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert astra_train(base, data, out, *([change["set"]] if "set" in change else [])) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("astra-train: ")
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_too_few_tokens_give_a_warning_and_null_spaces_a_remark_in_the_card(
    tiny_base, jsonl, rows, tmp_path, capsys
) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "calibration_rows=1") == 0
    warnings = capsys.readouterr().err
    assert "14 of 14 layers have fewer calibration tokens (" in warnings
    assert "raise calibration_rows" in warnings
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "more", "calibration_rows=40") == 0
    assert "layers" not in capsys.readouterr().err
    card = (tmp_path / "more" / "README.md").read_text().splitlines()
    (line,) = [line for line in card if line.startswith("| up_proj | 2 |")]
    assert line.endswith("the tail is a null space of W: A0 = 0 |")


def test_the_result_is_the_best_checkpoint_on_held_out_rows(tiny_base, jsonl, rows, tmp_path) -> None:
    settings = ("steps=40", "eval_share=0.25", "eval_steps=5", "eval_metric=exact_match", "learning_rate=3e-2")
    rows = [{"prompt": "say", "completion": " yes"}] * 20  # an answer that can be learned exactly
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", *settings) == 0
    origin = load_astra(tmp_path / "out").provenance
    evaluations = origin["evaluations"]
    assert [e["step"] for e in evaluations] == list(range(5, 45, 5))
    assert (evaluations[0]["eval_exact_match"], evaluations[-1]["eval_exact_match"]) == (0.0, 1.0)
    assert origin["best_step"] == next(e["step"] for e in evaluations if e["eval_exact_match"] == 1.0)


def test_without_an_exact_match_the_best_checkpoint_has_the_least_loss(tiny_base, jsonl, tmp_path) -> None:
    held_out = jsonl([{"prompt": "never", "completion": " seen before"}] * 4, "held_out.jsonl")
    settings = (f"eval_data={held_out}", "steps=20", "eval_steps=2", "eval_metric=exact_match", "learning_rate=0.2")
    assert astra_train(tiny_base, jsonl([{"text": "1 2 3 4"}] * 8), tmp_path / "out", *settings) == 0
    origin = load_astra(tmp_path / "out").provenance
    assert {e["eval_exact_match"] for e in origin["evaluations"]} == {0.0}
    best = min(origin["evaluations"], key=lambda e: e["eval_loss"])
    assert origin["best_step"] == best["step"] != origin["evaluations"][0]["step"]


def test_training_stops_early_when_patience_runs_out(tiny_base, jsonl, tmp_path) -> None:
    held_out = jsonl([{"prompt": "never", "completion": " seen before"}] * 4, "held_out.jsonl")
    settings = (f"eval_data={held_out}", "steps=60", "eval_steps=2", "patience=3", "learning_rate=0.2")
    assert astra_train(tiny_base, jsonl([{"text": "1 2 3 4"}] * 8), tmp_path / "out", *settings) == 0
    origin = load_astra(tmp_path / "out").provenance
    assert origin["evaluations"][-1]["step"] == origin["best_step"] + 6 < 60


@pytest.mark.parametrize("source", ["own", "given"])
def test_every_run_reports_its_forgetting(tiny_base, jsonl, rows, tmp_path, capsys, source: str) -> None:
    text = jsonl([{"text": "some other text"}], "text.jsonl")
    extra = () if source == "own" else (f"forgetting_data={text}",)
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "steps=30", *extra) == 0
    found = load_astra(tmp_path / "out").provenance["forgetting"]
    assert found["text"] == ("written by the base" if source == "own" else str(text))
    assert found["change"] == pytest.approx(found["after"] - found["before"])
    assert found["change"] != 0
    assert f"forgetting: {found['change']:+.3f}" in capsys.readouterr().out


def test_rows_that_are_left_out_or_cut_are_reported_and_recorded(tiny_base, jsonl, rows, tmp_path, capsys) -> None:
    long = [{"prompt": "word " * 99, "completion": "x"}, {"prompt": "go", "completion": " on" * 99}]
    data = jsonl([*rows, *long])
    assert astra_train(tiny_base, data, tmp_path / "out") == 0
    remarks = load_astra(tmp_path / "out").provenance["data"]["remarks"]
    assert list(remarks.values()) == [1, 1]
    reported, card = capsys.readouterr().err, (tmp_path / "out" / "README.md").read_text()
    options = ["--base", str(tiny_base), "--data", str(data), "--out", str(tmp_path / "dry"), "--max-length", "32"]
    assert main([*options, "--dry-run", "--rank", "4"]) == 0
    planned = capsys.readouterr().out
    for remark in remarks:
        assert f"{data}: 1 row {remark}" in reported
        assert f"1 {remark}" in card
        assert f"1 {remark}" in planned


def test_packing_trains_on_full_rows(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "packing=true", "steps=3") == 0


def test_gradient_checkpointing_and_accumulation_do_not_change_the_result(tiny_base, jsonl, rows, tmp_path) -> None:
    data = jsonl(rows)
    assert astra_train(tiny_base, data, tmp_path / "plain") == 0
    saving = ("gradient_checkpointing=true", "gradient_accumulation=2")
    assert astra_train(tiny_base, data, tmp_path / "saving", *saving) == 0
    plain, saving = (load_astra(tmp_path / name).layers for name in ("plain", "saving"))
    for name in plain:
        torch.testing.assert_close(plain[name].b, saving[name].b, rtol=1e-3, atol=1e-4)


def test_accumulation_does_not_change_the_loss_and_the_gradients_of_a_classifier(tiny_base, jsonl, tmp_path) -> None:
    data = jsonl([{"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in range(40)])
    for name, parts in (("whole", 1), ("parts", 4)):
        settings = ("task=classification", "batch_size=8", "max_grad_norm=1e9", f"gradient_accumulation={parts}")
        assert astra_train(tiny_base, data, tmp_path / name, *settings, "steps=2", "forgetting_rows=0") == 0
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "loss.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_label_names_are_in_the_adapter_its_record_and_the_record_of_the_lora(tiny_base, tmp_path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"number {i},{('None', '10', '9')[i % 3]}\n" for i in range(12)))
    settings = ("task=classification", "steps=2", "forgetting_rows=0")
    assert astra_train(tiny_base, data, tmp_path / "out", *settings) == 0
    assert convert([str(tmp_path / "out"), str(tmp_path / "lora")]) == 0
    names = {"0": "9", "1": "10", "2": "None"}
    for file in ("out/adapter_config.json", "out/astra.json", "lora/astra.json"):
        assert json.loads((tmp_path / file).read_text())["id2label"] == names
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    PeftModel.from_pretrained(base, tmp_path / "lora")  # PEFT would warn about a key of ours, and a warning is an error
    assert astra_train(tiny_base, data, tmp_path / "full", *settings, "method=full") == 0
    for file in ("full/config.json", "full/astra.json"):
        assert json.loads((tmp_path / file).read_text())["id2label"] == names


def test_a_classifier_learns_and_converts_with_its_head(tiny_base, jsonl, tmp_path) -> None:
    data = jsonl([{"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in range(40)])
    settings = ("task=classification", "steps=60", "batch_size=8", "eval_share=0.2", "eval_metric=accuracy")
    assert astra_train(tiny_base, data, tmp_path / "out", *settings) == 0
    adapter = load_astra(tmp_path / "out")
    assert set(adapter.head) == {"score.weight"}
    assert adapter.provenance["evaluations"][-1]["eval_accuracy"] > 0.9
    assert adapter.provenance["forgetting"]["change"] != 0  # of the language model of the classifier's backbone
    assert convert([str(tmp_path / "out"), str(tmp_path / "lora")]) == 0
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    base.config.pad_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = PeftModel.from_pretrained(base, tmp_path / "lora")
    with torch.no_grad():
        predicted = [
            int(model(**tokenizer(f"number {i}", return_tensors="pt")).logits.argmax()) for i in (2, 7, 12, 25)
        ]
    assert predicted == [0, 1, 0, 1]


@pytest.fixture(scope="session")
def tiny_encoder(request, tmp_path_factory, tokenizer) -> Path:
    """A two-layer encoder with a masked-language head and random weights, and its tokenizer."""
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "mask", "cls", "sep")}
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", words.cls_token_id), ("<sep>", words.sep_token_id)]
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        **{f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "cls", "sep")},
    )
    folder = tmp_path_factory.mktemp("base") / "encoder"
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("tiny_encoder", "sampled_text", "heads"),
    [("bert", True, {"bert.pooler.dense": 2, "classifier": 2}),
     ("modernbert", False, {"head.dense": 1, "head.norm": 1, "classifier": 2})],
    indirect=["tiny_encoder"],
)  # fmt: skip
def test_an_encoder_learns_to_classify_and_reports_its_forgetting(
    tiny_encoder, sampled_text, heads, jsonl, tmp_path
) -> None:
    data = jsonl([{"text": f"{'odd' if i % 2 else 'even'} {i}", "label": i % 2} for i in range(40)])
    text = jsonl([{"text": f"def function_{i}(x): return x + {i}"} for i in range(20)], "text.jsonl")
    settings = ["task=classification", "steps=60", "batch_size=8", "target_modules=all-linear"]
    settings += ["rank=4", "learning_rate=1e-2", *([] if sampled_text else [f"forgetting_data={text}"])]
    assert astra_train(tiny_encoder, data, tmp_path / "out", *settings) == 0
    found = load_astra(tmp_path / "out").provenance
    head = {f"{layer}.{('weight', 'bias')[i]}" for layer, parts in heads.items() for i in range(parts)}
    assert set(load_astra(tmp_path / "out").head) == head  # parameters that the language model does not have
    uniform = np.log(len(AutoTokenizer.from_pretrained(tiny_encoder)))
    # Only on its own text is the random encoder better than a uniform guess.
    assert (found["forgetting"]["before"] < uniform) == sampled_text
    assert found["forgetting"]["change"] != 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_ranks_follow_rank_pattern(tiny_base, jsonl, rows, tmp_path) -> None:
    pattern = "rank_pattern={'q_proj|k_proj': 2, 'layers.1.*q_proj': 3}"
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", pattern) == 0
    ranks = {name: len(layer.a) for name, layer in load_astra(tmp_path / "out").layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == ranks["model.layers.1.self_attn.k_proj"] == 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 3
    assert ranks["model.layers.1.mlp.up_proj"] == 4


@pytest.mark.parametrize("rule", ["effective_rank", "tail_energy"])
def test_rank_allocation_shares_the_budget(tiny_base, jsonl, rows, tmp_path, rule: str) -> None:
    settings = (f"rank_allocation={rule}", "calibration_rows=40")
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", *settings) == 0
    ranks = [len(layer.a) for layer in load_astra(tmp_path / "out").layers.values()]
    assert sum(ranks) == 4 * 14
    assert min(ranks) >= 1
    assert max(ranks) <= 16
    assert len(set(ranks)) > 1


def test_cached_gram_matrices_serve_another_rank_and_subspace(tiny_base, jsonl, rows, tmp_path, monkeypatch) -> None:
    data, cache = jsonl(rows), f"calibration_cache={tmp_path / 'cache'}"
    assert (
        astra_train(tiny_base, data, tmp_path / "plain", "rank=3", "subspace=principal", "calibration_overlap=1") == 0
    )
    assert astra_train(tiny_base, data, tmp_path / "first", cache, "spectra=false") == 0
    monkeypatch.setattr("trainer.start.initialise.gram_matrices", None)  # so a call would fail
    settings = ("rank=3", "subspace=principal", "spectra=false")
    assert astra_train(tiny_base, data, tmp_path / "second", cache, *settings) == 0
    plain, cached = (load_astra(tmp_path / name).layers for name in ("plain", "second"))
    assert all(torch.equal(plain[name].b0, cached[name].b0) for name in plain)


def test_a_damaged_cache_is_not_used(tiny_base, jsonl, rows, tmp_path) -> None:
    data, settings = jsonl(rows), (f"calibration_cache={tmp_path / 'cache'}", "spectra=false")
    assert astra_train(tiny_base, data, tmp_path / "first", *settings) == 0
    first = files(tmp_path / "first")["astra_weights.safetensors"]
    for number, damage in enumerate((b"", b"\x80\x04K\x01.", b"\xff" * 64)):
        for file in (tmp_path / "cache").rglob("*.safetensors"):
            file.write_bytes(damage)
        assert astra_train(tiny_base, data, tmp_path / str(number), *settings) == 0
        assert files(tmp_path / str(number))["astra_weights.safetensors"] == first


def test_calibration_stops_when_the_subspaces_have_converged(tiny_base, jsonl, tmp_path) -> None:
    data = jsonl([{"text": f"the same text again {i % 2}"} for i in range(64)])
    settings = ("calibration_rows=64", "target_modules=[down_proj]", "spectra=false", "subspace=principal")
    assert astra_train(tiny_base, data, tmp_path / "early", *settings) == 0
    origin = load_astra(tmp_path / "early").provenance
    assert origin["convergence"][-1]["lowest"] >= 0.99
    used = {spectrum["n_tokens"] for spectrum in origin["spectra"].values()}
    assert used == {origin["convergence"][-1]["n_tokens"]}
    assert astra_train(tiny_base, data, tmp_path / "all", *settings, "calibration_overlap=1") == 0
    everything = load_astra(tmp_path / "all").provenance
    assert everything["convergence"] == []
    assert max(used) < max(spectrum["n_tokens"] for spectrum in everything["spectra"].values())


def test_the_first_step_changes_the_adapter(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "steps=1") == 0
    assert all(not torch.equal(layer.a, layer.a0) for layer in load_astra(tmp_path / "out").layers.values())


def test_the_learning_rate_rises_then_falls_and_is_never_zero() -> None:
    config = TrainConfig(steps=20, warmup=0.2)
    rates = [learning_rate_factor(config, step) for step in range(20)]
    assert max(rates) == rates[4] == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert min(rates) > 0


def test_resume_after_a_crash_while_writing_gives_the_same_bytes(tiny_base, jsonl, rows, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    data = jsonl(rows)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.report.write", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            astra_train(tiny_base, data, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.unfinished"]
    options = [word for setting in FAST for word in ("--set", setting)]
    assert (
        main(["--base", str(tiny_base), "--data", str(data), "--out", str(tmp_path / "out"), "--resume", *options]) == 0
    )
    assert astra_train(tiny_base, data, tmp_path / "uninterrupted") == 0
    assert files(tmp_path / "out") == files(tmp_path / "uninterrupted")
    assert not (tmp_path / "out.unfinished").exists()


def test_the_base_on_disk_is_unchanged(tiny_base, jsonl, rows, tmp_path) -> None:
    before = files(tiny_base)
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out") == 0
    assert files(tiny_base) == before
    AutoModelForCausalLM.from_pretrained(tiny_base)
