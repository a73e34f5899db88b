"""The operators by themselves: shapes that the AVX-512 one cannot take, compilation, machines without a compiler."""

import logging

import pytest
import torch

from astra_serve.cpu_lora import ops

GROUPS = (
    torch.tensor([2, 0, 3, 1], dtype=torch.int32),  # row 2 has no adapter
    torch.tensor([1, 3, 3, 4], dtype=torch.int32),  # slot 0: rows 0 and 3, slot 1: none, slot 2: row 1
    torch.tensor([8, 8, 3], dtype=torch.int32),
)
fastest = ops.fastest_lora_linear()
AVX512 = pytest.mark.skipif(fastest is ops.lora_linear, reason="this CPU has no AVX-512 BF16, or no compiler is here")


def layer(d_in: int, widths: tuple[int, ...], max_rank: int, dtype: torch.dtype = torch.bfloat16):
    """y, x, A and B of a layer with 3 slots; zero beyond each slot's rank."""
    made = torch.Generator().manual_seed(0)
    a = [torch.randn(3, 1, max_rank, d_in, generator=made).to(dtype) for _ in widths]
    b = [torch.randn(3, 1, width, max_rank, generator=made).to(dtype) for width in widths]
    for stacked in a:
        for slot, rank in enumerate(GROUPS[2].tolist()):
            stacked[slot, :, rank:] = 0
    return torch.randn(4, sum(widths), generator=made).to(dtype), torch.randn(4, d_in, generator=made).to(dtype), a, b


def expected(y, x, a, b, groups=GROUPS) -> torch.Tensor:
    """The operator's definition, row by row in float64."""
    rows, starts, _ = (part.tolist() for part in groups)
    result = y.double().clone()
    for slot in range(3):
        for row in rows[starts[slot] : starts[slot + 1]]:
            inner = [a_i[slot, 0].double() @ x[row].double() for a_i in a]
            result[row] += 0.5 * torch.cat([b_i[slot, 0].double() @ i for b_i, i in zip(b, inner, strict=True)])
    return result


CLOSE = {"rtol": 2e-2, "atol": 0.6}


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
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 3, 64, 65, 200])
def test_the_avx512_operator_agrees_with_the_portable_one(tokens: int, threads: int) -> None:
    """Any number of rows per adapter and of threads; the two round in the same places but sum in another order."""
    groups = (
        torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).sort().values.int(),
        torch.tensor([0, 0, tokens // 3, tokens], dtype=torch.int32),
        torch.tensor([8, 16, 13], dtype=torch.int32),
    )
    _, _, a, b = layer(256, (160, 48), 16)
    x, y = torch.randn(tokens, 256).bfloat16(), torch.randn(tokens, 208).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [y.clone(), y.clone()]
        for linear, result in zip((fastest, ops.lora_linear), results, strict=True):
            linear(result, x, a, b, *groups, 1.0)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=2e-2, atol=1.0)


@pytest.mark.parametrize("linear", [ops.lora_linear, fastest], ids=["portable", "fastest"])
def test_one_compiled_model_serves_every_mix_of_adapters(linear) -> None:
    """What changes from step to step is in tensors: nothing of a step may be frozen into the compiled code."""
    y, x, a, b = layer(64, (48, 16), 8)
    groups = [part.clone() for part in GROUPS]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(x: torch.Tensor) -> torch.Tensor:
        out = y * 1
        linear(out, x, a, b, *groups, 0.5)
        return out + 0

    torch.testing.assert_close(model(x).double(), expected(y, x, a, b), **CLOSE)
    for part, new in zip(groups, ([0, 1, 2, 3], [0, 0, 4, 4], [8, 8, 8]), strict=True):
        part.copy_(torch.tensor(new))
    torch.testing.assert_close(model(x).double(), expected(y, x, a, b, groups), **CLOSE)


def test_the_operators_declare_what_they_do() -> None:
    y, x, a, b = layer(64, (48, 16), 8, torch.float32)
    inner = [torch.zeros(4, 8), torch.zeros(4, 8)]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.lora_linear, (y, x, a, b, *GROUPS, 0.5), test_utils=checks)
    torch.library.opcheck(ops.lora_shrink, (inner, x, a, *GROUPS, 0.5), test_utils=checks)
    torch.library.opcheck(ops.lora_expand, (y, inner, b, *GROUPS, [48, 16], 0, True), test_utils=checks)


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ops, "_compiled", lambda: tmp_path / "broken.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING, logger=ops.__name__):
        assert ops.fastest_lora_linear() is ops.lora_linear
    assert len(caplog.records) == 1
