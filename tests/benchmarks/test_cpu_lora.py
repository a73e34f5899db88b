"""The figures that `benchmarks.cpu_lora` computes; the measurement itself needs minutes and an idle machine."""

import json
from pathlib import Path

import pytest

from benchmarks import cpu_lora, report
from benchmarks.cpu_lora import Case
from benchmarks.offline_engine import Speed

MACHINE = {"read_gb_s": 20.0, "bf16_gflop_s": 400.0}
HEADLINE = Case("300M", rank=64, adapters=4, kind="decode", concurrency=32, headline=True)


def speeds(decode: list[float]) -> list[Speed]:
    return [Speed(prefill=1000.0, decode=rate, ttft=0.1) for rate in decode]


@pytest.fixture
def row() -> dict:
    measured = {"base": speeds([400, 100, 320]), "ours": speeds([200, 90, 240]), "stock": speeds([10, 10])}
    return cpu_lora.row(HEADLINE, measured, lora_parameters=10**7, base_bytes=10**8, machine=MACHINE)


def test_a_ratio_is_the_median_of_the_ratios_of_the_turns(row: dict) -> None:
    """A slow machine slows both engines of a turn; the ratio of the medians would be 200 / 320."""
    assert row["vs_base"] == 0.75
    assert row["vs_stock"] == pytest.approx((20 + 9) / 2)
    assert row["base_tok_s"] == 320
    assert row["repetitions"]["ours"] == [200, 90, 240]


def test_the_shortest_step_is_the_longer_one_of_reading_and_arithmetic(row: dict) -> None:
    assert row["base_step_ms"] == 100.0  # 32 tokens at 320 tokens/s
    assert row["lora_step_floor_ms"] == 4.0  # four adapters of 20 MB at 20 GB/s; 0.64 GFLOP take 1.6 ms
    assert row["floor_vs_base"] == pytest.approx(100 / 104, abs=1e-3)
    many = Case("300M", rank=64, adapters=1, kind="decode", concurrency=32, headline=True)
    found = cpu_lora.row(many, {k: speeds([320]) for k in ("base", "ours", "stock")}, 10**7, 10**8, MACHINE)
    assert found["lora_step_floor_ms"] == 1.6


@pytest.fixture
def written(row: dict, tmp_path: Path) -> dict:
    """The content of a result file."""
    result = {"summary": cpu_lora.summarise([row], MACHINE), "cases": [row], "env": report.environment(0)}
    report.write(tmp_path / "x" / "result.json", **result)
    return json.loads((tmp_path / "x" / "result.json").read_text())


def test_the_summary_has_the_figures_of_the_headline_case(written: dict) -> None:
    assert written["summary"]["vs_base"] == 0.75
    assert written["summary"]["vs_stock_if_lora_were_free"] == 32.0


def test_a_result_file_describes_the_machine(written: dict) -> None:
    assert {"machine", "cores", "versions", "commit", "seed"} <= written["env"].keys()


def test_the_plot_is_drawn_from_the_result_file(written: dict, tmp_path: Path) -> None:
    cpu_lora.plot(written, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
