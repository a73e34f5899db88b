"""The operators by themselves: shapes that the AVX-512 one cannot take, compilation, machines without a compiler."""

import logging
import shutil

import pytest
import torch

from astra_serve.cpu_lora import ops

GROUPS = (
    torch.tensor([2, 0, 3, 1], dtype=torch.int32),  # row 2 has no adapter
    torch.tensor([1, 3, 3, 4], dtype=torch.int32),  # slot 0: rows 0 and 3, slot 1: none, slot 2: row 1
    torch.tensor([8, 8, 3], dtype=torch.int32),
)
fastest = ops.fastest_lora_linear()
AVX512 = pytest.mark.skipif(
    not (torch.cpu.get_capabilities().get("avx512_bf16") and shutil.which("g++")),
    reason="this CPU has no AVX-512 BF16, or g++ is not installed",
)


def layer(
    d_in: int,
    widths: tuple[int, ...],
    max_rank: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 4,
    ranks=GROUPS[2],
):
    """y, x, A and B of a layer with 3 slots. A is zero beyond each slot's rank, as in the engine; B is not, here."""
    made = torch.Generator().manual_seed(0)
    a = [(torch.randn(3, 1, max_rank, d_in, generator=made) / d_in**0.5).to(dtype) for _ in widths]
    b = [torch.randn(3, 1, width, max_rank, generator=made).to(dtype) for width in widths]
    for stacked in a:
        for slot, rank in enumerate(ranks.tolist()):
            stacked[slot, :, rank:] = 0
    x, y = torch.randn(rows, d_in, generator=made), torch.randn(rows, sum(widths), generator=made)
    return y.to(dtype), x.to(dtype), a, b


def expected(y, x, a, b, groups=GROUPS) -> torch.Tensor:
    """The operator's definition, row by row in float64."""
    rows, starts, _ = (part.tolist() for part in groups)
    result = y.double().clone()
    for slot in range(3):
        for row in rows[starts[slot] : starts[slot + 1]]:
            inner = [a_i[slot, 0].double() @ x[row].double() for a_i in a]
            result[row] += 0.5 * torch.cat([b_i[slot, 0].double() @ i for b_i, i in zip(b, inner, strict=True)])
    return result


CLOSE = {"rtol": 2e-2, "atol": 0.1}


@AVX512
def test_where_the_cpu_and_a_compiler_allow_it_the_fastest_operator_is_the_avx512_one() -> None:
    assert fastest is torch.ops.astra.lora_linear_avx512.default


@pytest.mark.parametrize(
    ("d_in", "widths", "max_rank"),
    [(96, (80, 16), 16), (64, (48,), 512), (100, (48,), 16), (64, (50, 16), 8), (64, (48,), 1), (32, (16,) * 9, 8)],
    ids=["fits", "largest rank", "odd width in", "odd width out", "rank 1", "nine slices"],
)
def test_the_fastest_operator_takes_every_shape(d_in, widths, max_rank) -> None:
    y, x, a, b = layer(d_in, widths, max_rank)
    reference = expected(y, x, a, b)
    fastest(y, x, a, b, *GROUPS, 0.5)
    torch.testing.assert_close(y.double(), reference, **CLOSE)


def test_the_fastest_operator_takes_float32_and_views() -> None:
    y, x, a, b = layer(64, (48, 16), 8, torch.float32)
    reference = expected(y, x, a, b)
    fastest(y, x, a, b, *GROUPS, 0.5)
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=1e-4)
    y, x, a, b = layer(64, (48, 16), 8)
    wide_y, wide_x = torch.zeros(4, 100, dtype=y.dtype), torch.zeros(4, 90, dtype=x.dtype)
    wide_y[:, 3:67], wide_x[:, 7:71] = y, x
    fastest(wide_y[:, 3:67], wide_x[:, 7:71], a, b, *GROUPS, 0.5)
    torch.testing.assert_close(wide_y[:, 3:67].double(), expected(y, x, a, b), **CLOSE)
    assert (wide_y[:, :3] == 0).all()
    assert (wide_y[:, 67:] == 0).all()


@AVX512
@pytest.mark.parametrize("ranks", [[8, 16, 13], [64, 1, 40], [512, 512, 257], [2**31 - 1] * 3], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 3, 64, 65, 200])
def test_the_avx512_operator_agrees_with_the_portable_one(tokens: int, threads: int, ranks: list[int]) -> None:
    """Any number of rows per adapter, threads and ranks; both round in the same places but sum in another order."""
    slots = torch.randint(-1, 3, (tokens,), generator=torch.Generator().manual_seed(tokens))
    groups = (
        torch.argsort(slots, stable=True).int(),
        torch.bincount(slots + 1, minlength=4).cumsum(0).int(),
        torch.tensor(ranks, dtype=torch.int32),
    )
    max_rank = 64 if max(ranks) <= 64 else 512
    y, x, a, b = layer(256, (160, 48), max_rank, rows=tokens, ranks=groups[2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [y.clone(), y.clone()]
        for linear, result in zip((fastest, ops.lora_linear), results, strict=True):
            linear(result, x, a, b, *groups, 1.0)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-3 * max_rank**0.5 + 0.1)
    assert torch.equal(results[0][slots < 0], y[slots < 0])


@pytest.mark.parametrize("linear", [ops.lora_linear, fastest], ids=["portable", "fastest"])
def test_a_float32_output_of_bfloat16_weights_is_not_rounded(linear) -> None:
    """Heads are float32 where a model asks for it: what LoRA does not change keeps every bit."""
    y, x, a, b = layer(64, (48, 16), 8)
    y = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    reference = expected(y, x, a, b)
    linear(y, x, a, b, *GROUPS, 0.5)
    torch.testing.assert_close(y.double(), reference, rtol=1e-2, atol=2e-2)
    b[0].zero_(), b[1].zero_()
    before = y.clone()
    linear(y, x, a, b, *GROUPS, 0.5)
    assert torch.equal(y, before)


@pytest.mark.parametrize("linear", [ops.lora_linear, fastest], ids=["portable", "fastest"])
def test_a_layer_with_fewer_rows_than_the_step_is_refused(linear) -> None:
    y, x, a, b = layer(64, (48, 16), 8)
    with pytest.raises(RuntimeError, match="4 rows, the layer 2"):
        linear(y[:2], x[:2], a, b, *GROUPS, 0.5)


def test_the_operators_pass_pytorchs_own_checks() -> None:
    y, x, a, b = layer(64, (48, 16), 8, torch.float32)
    inner = [torch.zeros(4, 8), torch.zeros(4, 8)]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    calls = [
        (ops.lora_linear, (y, x, a, b, *GROUPS, 0.5)),
        (ops.lora_shrink, (inner, x, a, *GROUPS, 0.5)),
        (ops.lora_expand, (y, inner, b, *GROUPS, [48, 16], 0, True)),
    ]
    for operator, arguments in calls:
        assert torch.library.opcheck(operator, arguments, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


@AVX512
@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "false"])
def test_without_a_working_compiler_one_warning_and_the_portable_operator(
    compiler, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING, logger=ops.__name__):
        assert ops.fastest_lora_linear() is ops.lora_linear
    assert len(caplog.records) == 1
    assert list(tmp_path.rglob("*.so")) == []


@AVX512
def test_a_broken_library_in_the_cache_is_not_fatal(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(ops, "_compiled", lambda: tmp_path / "broken.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING, logger=ops.__name__):
        assert ops.fastest_lora_linear() is ops.lora_linear
    assert len(caplog.records) == 1
