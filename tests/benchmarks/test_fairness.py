"""The figures of the fairness benchmark, from measurements that are known."""

import pytest

from benchmarks.fairness import Rival, case, summarise
from tests.support.server import Server


def rival(name: str, alone_s: float, beside_s: float, tok_s: list[float]) -> Rival:
    return Rival(name, Server, [alone_s] * 3, [beside_s] * 3, tok_s)  # type: ignore[arg-type]


def test_ratios_are_of_medians_and_pairs_of_turns_and_the_share_error_is_the_largest_of_a_tenant() -> None:
    rivals = rival("fair", 0.01, 0.04, [99, 190]), rival("without", 0.01, 2.0, [100, 200]), rival("vllm", 0.02, 4, [1])
    found = summarise([case(one) for one in rivals], {"light": 110, "middle": 200, "heavy": 390})
    assert found["ratio"] == pytest.approx(4)
    assert found["without_tenants_ratio"] == pytest.approx(200)
    assert found["stock_ratio"] == pytest.approx(200)
    assert found["throughput_ratio"] == pytest.approx((0.99 + 0.95) / 2)
    assert found["share_error"] == pytest.approx(0.1)
