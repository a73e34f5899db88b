"""`astra-train` as a user runs it, on the tiny base: what it writes, that it repeats, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from converter.adapter_dir import base_digest, load_astra
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.data import data_digest
from trainer.train import learning_rate_factor

FAST = ("rank=4", "steps=6", "batch_size=4", "max_length=32", "calibration_rows=8", "learning_rate=1e-2")


def astra_train(base: Path | str, data: Path, out: Path, *settings: str) -> int:
    options = [word for setting in (*FAST, *settings) for word in ("--set", setting)]
    return main(["--base", str(base), "--data", str(data), "--out", str(out), *options])


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_leaves_a_complete_adapter_folder(tiny_base, jsonl, rows, tmp_path) -> None:
    data = jsonl(rows)
    assert astra_train(tiny_base, data, tmp_path / "out", "alpha=8") == 0
    assert set(files(tmp_path / "out")) == {
        "astra_weights.safetensors",
        "adapter_config.json",
        "astra.json",
        "README.md",
        "loss.jsonl",
        "loss.png",
    }
    adapter = load_astra(tmp_path / "out")
    assert len(adapter.layers) == 14
    assert adapter.scaling == 2.0
    assert adapter.config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    origin = adapter.provenance
    assert origin["base"] == {"id": str(tiny_base), "digest": base_digest(tiny_base), "dtype": "float32"}
    assert origin["data"] == {"file": data.name, "digest": data_digest(data), "rows": len(rows)}
    assert origin["config"]["steps"] == 6
    assert set(origin["spectra"]) == set(adapter.layers)
    assert {"python", "torch", "transformers", "peft", "astra-serve"} <= set(origin["versions"])
    points = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_lowers_the_loss_and_moves_every_layer(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "steps=60") == 0
    points = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert points[-1]["loss"] < points[0]["loss"] - 0.2
    for layer in load_astra(tmp_path / "out").layers.values():
        assert not torch.equal(layer.a, layer.a0)
        assert not torch.equal(layer.b, layer.b0)


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tiny_base, jsonl, rows, tmp_path) -> None:
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
    assert astra_train(tiny_base, data, tmp_path / "many", "calibration_memory=1e-6") == 0
    one, many = (load_astra(tmp_path / name).layers for name in ("one", "many"))
    assert all(torch.equal(one[name].a, many[name].a) for name in one)


def test_the_strict_subspace_keeps_b(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "train_b=false") == 0
    assert all(torch.equal(layer.b, layer.b0) for layer in load_astra(tmp_path / "out").layers.values())


def test_where_outputs_outnumber_inputs_the_tail_is_a_null_space_and_a0_is_zero(
    tiny_base, jsonl, rows, tmp_path
) -> None:
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
        ({"rows": [{"text": "fine"}, {"foo": 1}]}, "line 2: a row is"),
        ({"rows": [{"messages": [{"role": "assistant", "content": "x"}]}]}, 'line 1: "messages" need a question'),
        ({"set": "rank=17"}, "rank 17 is larger than layer"),
        ({"set": "target_modules=[nothing]"}, "there are: down_proj, gate_proj"),
        ({"set": "learning_rate=1e30"}, "lower learning_rate"),
        ({"set": "stepz=3"}, "the nearest one is 'steps'"),
        ({"set": "learning_rate=.inf"}, "finite"),
        ({"out": "EXISTS"}, "exists already"),
        ({"out": "UNDER_A_FILE"}, "cannot be made"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_bad_input_gives_one_line_status_2_and_writes_nothing(
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
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("astra-train: ")
    assert message in said
    assert sorted(tmp_path.rglob("*")) == before


def test_one_step_already_moves_the_adapter(tiny_base, jsonl, rows, tmp_path) -> None:
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out", "steps=1") == 0
    assert all(not torch.equal(layer.a, layer.a0) for layer in load_astra(tmp_path / "out").layers.values())


def test_the_learning_rate_rises_falls_and_is_never_zero_before_the_end() -> None:
    config = TrainConfig(steps=20, warmup=0.2)
    rates = [learning_rate_factor(config, step) for step in range(20)]
    assert max(rates) == rates[4] == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert min(rates) > 0


def test_a_crash_while_writing_leaves_nothing(tiny_base, jsonl, rows, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("trainer.train.write_card", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        astra_train(tiny_base, jsonl(rows), tmp_path / "work" / "out")
    assert not (tmp_path / "work").exists()


def test_the_base_on_disk_is_not_touched(tiny_base, jsonl, rows, tmp_path) -> None:
    before = files(tiny_base)
    assert astra_train(tiny_base, jsonl(rows), tmp_path / "out") == 0
    assert files(tiny_base) == before
    AutoModelForCausalLM.from_pretrained(tiny_base)
