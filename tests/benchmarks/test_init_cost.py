"""The figures that `benchmarks.init_cost` computes; the measurement at full width takes hours."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import init_cost, initialisers, report
from benchmarks.init_cost import GIB
from benchmarks.initialisers import MODELS, Shape
from trainer.adapter import target_layers
from trainer.config import TrainConfig
from trainer.start.eigenspace import overlap

# hidden 4, keys and values 2 wide: q (4, 4), k and v (2, 4), o (4, 4), gate and up (8, 4), down (4, 8)
SHAPE = Shape("llama", intermediate=8, layers=3, heads=2, kv_heads=1, head_dim=2)
STARTS = 4 * 16 * (8 + 6 + 6 + 8 + 12 + 12 + 12)  # A0 and B0 of rank 16, float32
OUR_GRAMS = 8 * (16 + 4 + 4 + 16 + 16 + 16 + 16)  # float64, on each layer's smaller side
OUTPUT = 2 * 128 * 128 * 4  # of one layer for all tokens, bfloat16
ENV = {"time": "now", "commit": "none"}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread: with small matrices several are slower, much slower on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for child processes
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one(seconds: float, peak_gib: float = 1.0) -> dict[str, float]:
    return {"seconds": seconds, "peak_gib": peak_gib, "passes": 1.0, "forward_s": 2.0}


@pytest.mark.parametrize("model", MODELS)
def test_the_measured_layer_has_the_shapes_of_the_extrapolation(model: str) -> None:
    shape = MODELS[model].smaller(4)
    layers = target_layers(initialisers.build(shape)[0], TrainConfig())
    assert {name.rpartition(".")[2]: tuple(layer.weight.shape) for name, layer in layers.items()} == shape.linear()


def test_the_shapes_are_those_of_the_published_models() -> None:
    llama, qwen = (MODELS[name].linear() for name in ("llama-3-8b", "qwen3-8b"))
    assert llama["gate_proj"] == (14336, 4096)
    assert qwen["down_proj"] == (4096, 12288)
    assert llama["k_proj"] == qwen["k_proj"] == (1024, 4096)
    assert (MODELS["llama-3-8b"].layers, MODELS["qwen3-8b"].layers) == (32, 36)


def test_the_bytes_kept_per_layer_follow_from_the_shapes() -> None:
    outputs = 4 * (16 + 4 + 4 + 16 + 64 + 64 + 16)
    covariances, decompositions = 4 * (6 * 16 + 64), 4 * (2 * 4 * 9 + 2 * 2 * 7 + 3 * 4 * 13)
    assert init_cost.kept_per_layer("ours", SHAPE) == STARTS
    assert init_cost.kept_per_layer("keep_everything", SHAPE) == outputs + STARTS
    assert init_cost.kept_per_layer("corda", SHAPE) == covariances + decompositions + STARTS
    assert init_cost.kept_per_layer("eva", SHAPE) == (4 * 16 + 16) * (6 * 4 + 8) + STARTS


def test_a_rival_needs_time_and_memory_for_every_layer() -> None:
    found = init_cost.whole_model("keep_everything", one(10), SHAPE, memory=0)
    assert found == {"whole_s": 30, "whole_peak_gib": 1 + 2 * init_cost.kept_per_layer("keep_everything", SHAPE) / GIB}


def test_each_further_group_of_ours_computes_one_more_layer_and_keeps_its_output() -> None:
    found = init_cost.whole_model("ours", one(10), SHAPE, memory=OUR_GRAMS)  # a layer at a time
    assert found["groups"] == 3
    assert found["whole_s"] == 3 * 10 + 2 * 2
    assert found["whole_peak_gib"] == 1 + (2 * STARTS + OUTPUT) / GIB
    all_at_once = init_cost.whole_model("ours", one(10), SHAPE, memory=3 * OUR_GRAMS)
    assert all_at_once == {"whole_s": 30, "whole_peak_gib": 1 + 2 * (STARTS + OUR_GRAMS) / GIB, "groups": 1}
    early = init_cost.whole_model("ours", one(10) | {"passes": 0.5}, SHAPE, memory=OUR_GRAMS)
    assert early["whole_s"] == 3 * 10 + 2 * 2 / 2


def test_ours_needs_the_memory_of_its_largest_group() -> None:
    found = init_cost.whole_model("ours", one(10), SHAPE, memory=OUR_GRAMS + 200)  # q, k and v of the next layer fit
    assert found["whole_peak_gib"] == pytest.approx(1 + (2 * STARTS + OUTPUT + 128 + 32 + 32) / GIB, abs=1e-12)


def test_a_ratio_is_the_rivals_median_divided_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_cost, "kept_per_layer", lambda contestant, _: GIB if contestant == "corda" else 0)
    rows = [
        init_cost.row("llama-3-8b", "corda", SHAPE, [one(80, 2.0)], ENV),
        init_cost.row("llama-3-8b", "ours", SHAPE, [one(10), one(90), one(8)], ENV),
        init_cost.row("qwen3-8b", "eva", SHAPE, [one(5)], ENV),  # `ours` was not measured for this model
    ]
    summary = init_cost.summarise(rows)
    assert summary["llama_3_8b.ours.time_s"] == 30
    assert summary["llama_3_8b.corda.time_ratio"] == summary["llama_3_8b.corda.one_layer_time_ratio"] == 8
    assert summary["llama_3_8b.corda.peak_memory_ratio"] == 4
    assert "qwen3_8b.eva.time_s" in summary
    assert "qwen3_8b.eva.time_ratio" not in summary
    assert summary["targets"] == {"keep_everything.time_ratio": 3, "keep_everything.peak_memory_ratio": 10}


def test_contestants_take_turns_and_ours_is_added_if_it_is_missing() -> None:
    both = init_cost.turns(["a", "b"], ["eva", "corda"], {("a", "ours")}, once=False)
    assert both[:3] == [("a", "eva"), ("a", "corda"), ("a", "eva")]
    assert both[3:] == [("b", name) for name in ("ours", "eva", "corda", "ours", "eva", "ours")]
    everything = init_cost.turns(["a", "b"], None, set(), once=True)
    assert len(everything) == len(set(everything)) == 11  # the eigensolver for one model only


def test_earlier_rows_with_the_same_shapes_are_kept(tmp_path: Path) -> None:
    rows = [init_cost.row("llama-3-8b", name, SHAPE, [one(1)], ENV) for name in ("ours", "eva")]
    rows.append(init_cost.row("qwen3-8b", "ours", MODELS["qwen3-8b"].smaller(4), [one(1)], ENV))
    report.write(tmp_path / "found.json", {}, rows, report.environment(0))
    shapes = {"llama-3-8b": SHAPE, "qwen3-8b": MODELS["qwen3-8b"]}
    assert init_cost.earlier(tmp_path / "found.json", shapes) == {
        ("llama-3-8b", row["contestant"]): row for row in rows[:2]
    }
    assert init_cost.earlier(tmp_path / "none.json", shapes) == {}


@pytest.mark.usefixtures("one_thread")
def test_keep_everything_and_ours_return_the_same_initial_factors() -> None:
    model, batches = initialisers.build(initialisers.WARM_UP)
    plain = initialisers.keep_everything(model, batches)
    found = initialisers.ours(model, batches, spectra=False).starts
    for name, (a0, b0) in plain.items():
        torch.testing.assert_close(a0, b0.T @ model.get_submodule(name).weight.float())
        if not name.endswith(("gate_proj", "up_proj")):  # their tail is an arbitrary basis of a null space
            assert overlap(b0, found[name].b0) > 0.99


@pytest.mark.usefixtures("one_thread")
def test_a_quick_run_measures_every_contestant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_cost, "QUICK_HEAD_DIM", 4)
    out = tmp_path / "x" / "quick.json"
    monkeypatch.setattr(sys, "argv", ["init_cost", "--quick", "--out", str(out)])
    assert init_cost.main() == 0
    result = json.loads(out.read_text())
    ratios = {f"{kind}_ratio" for kind in ("time", "one_layer_time", "peak_memory")}
    for rival in ("ours_with_spectra", "keep_everything", "corda", "eva"):
        assert {f"llama_3_8b.{rival}.{ratio}" for ratio in ratios} <= result["summary"].keys()
    assert {"llama_3_8b.ours.time_s", "llama_3_8b.ours.peak_gib", "eigensolver_speedup"} <= result["summary"].keys()
    assert abs(result["summary"]["eigensolver_excess_energy"]) < 1e-3
    for row in result["cases"]:
        assert {"repetitions", "time", "commit", "shape"} <= row.keys()
        assert row["contestant"] == "eigensolver" or row["extrapolation"] == init_cost.HOW[row["contestant"]]
    out.with_suffix(".png").unlink()
    monkeypatch.setattr(sys, "argv", ["init_cost", "--redraw", str(out)])
    assert init_cost.main() == 0
    assert out.with_suffix(".png").stat().st_size > 1000
