"""What the benchmark of CPU LoRA makes of its measurements; the measuring itself needs minutes and an idle machine."""

import json
from pathlib import Path

import pytest

from benchmarks import cpu_lora, report
from benchmarks.cpu_lora import Case
from benchmarks.offline_engine import Speed

MACHINE = {"read_gb_s": 20.0, "bf16_gflop_s": 400.0}
HEADLINE = Case("300M", rank=64, adapters=4, kind="decode", concurrency=32)


def speeds(decode: list[float]) -> list[Speed]:
    return [Speed(prefill=1000.0, decode=rate, ttft=0.1) for rate in decode]


@pytest.fixture
def row() -> dict:
    measured = {"base": speeds([400, 100, 320]), "ours": speeds([200, 90, 240]), "stock": speeds([10, 10])}
    return cpu_lora.row(HEADLINE, measured, lora_parameters=10**7, machine=MACHINE)


def test_ratios_pair_the_engines_turn_by_turn(row: dict) -> None:
    """A slow moment of the machine slows both engines of a turn: the ratio of the medians would be 200 / 320."""
    assert row["vs_base"] == 0.75
    assert row["vs_stock"] == pytest.approx((20 + 9) / 2)
    assert row["base_tok_s"] == 320
    assert row["repetitions"]["ours"] == [200, 90, 240]


def test_the_floor_is_the_larger_of_reading_every_adapter_once_and_the_arithmetic(row: dict) -> None:
    assert row["base_step_ms"] == 100.0  # 32 tokens at 320 tokens/s
    assert row["lora_step_floor_ms"] == 4.0  # four adapters of 20 MB at 20 GB/s; 0.64 GFLOP take 1.6 ms
    assert row["floor_vs_base"] == pytest.approx(100 / 104, abs=1e-3)
    many = Case("300M", rank=64, adapters=1, kind="decode", concurrency=32)
    found = cpu_lora.row(many, {k: speeds([320]) for k in ("base", "ours", "stock")}, 10**7, MACHINE)
    assert found["lora_step_floor_ms"] == 1.6


def test_the_summary_is_the_headline_case_and_the_plot_comes_from_the_json_alone(row: dict, tmp_path: Path) -> None:
    result = {"summary": cpu_lora.summarise([row], MACHINE), "cases": [row], "env": report.environment(0)}
    report.write(tmp_path / "x" / "result.json", **result)
    read = json.loads((tmp_path / "x" / "result.json").read_text())
    assert read["summary"]["vs_base"] == 0.75
    assert read["summary"]["vs_stock_if_lora_were_free"] == 32.0
    assert {"machine", "cores", "versions", "commit", "seed"} <= read["env"].keys()
    cpu_lora.plot(read, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
