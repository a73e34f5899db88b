"""What a request leaves in vLLM's attention cache, and what the next one of that block computes: real kernels."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from astra_serve.cpu_lora import finite_cache

HEADS, SIZE, BLOCK, TOKENS = 2, 32, 32, 5


@pytest.fixture
def plugged(monkeypatch):
    """vLLM's attention with the plugin; put back afterwards."""
    write = CPUAttentionBackendImpl.do_kv_cache_update
    monkeypatch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", getattr(write, "of_any_numbers", write))
    finite_cache.keep_finite()
    finite_cache.keep_finite()  # a second time changes nothing
    assert CPUAttentionBackendImpl.do_kv_cache_update.of_any_numbers is getattr(write, "of_any_numbers", write)


def answer(leftover: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns the attention of a request of TOKENS tokens in a block into which another wrote `leftover`."""
    layer = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
    attention = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto")
    cache = torch.zeros(1, HEADS, BLOCK, 2 * SIZE, dtype=dtype)
    if leftover is not None:
        CPUAttentionBackendImpl.do_kv_cache_update(attention, layer, leftover, leftover, cache, torch.arange(BLOCK))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(TOKENS, HEADS, SIZE, generator=generator).to(dtype) for _ in range(3))
    CPUAttentionBackendImpl.do_kv_cache_update(attention, layer, key, value, cache, torch.arange(TOKENS))
    lengths, starts = torch.tensor([TOKENS], dtype=torch.int32), torch.tensor([0, TOKENS], dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1, num_heads=HEADS, num_kv_heads=HEADS, head_dim=SIZE, seq_lens=lengths, dtype=dtype,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=False,
        dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    keys, values = cache.view(1, HEADS, 2 * BLOCK, SIZE).chunk(2, dim=2)
    output = torch.zeros(TOKENS, HEADS, SIZE, dtype=dtype)
    ops.cpu_attention_with_kv_cache(
        query=query, key_cache=keys, value_cache=values, output=output, query_start_loc=starts, seq_lens=lengths,
        scale=SIZE**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
        block_table=torch.zeros(1, 1, dtype=torch.int32), softcap=0.0, scheduler_metadata=plan, s_aux=None,
        dynamic_causal=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip
    return output


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_numbers_that_are_not_finite_do_not_reach_the_next_request(number: float, dtype: torch.dtype) -> None:
    leftover = torch.full((BLOCK, HEADS, SIZE), number).to(dtype)
    assert torch.equal(answer(leftover, dtype), answer(None, dtype))


def test_without_the_plugin_they_do(monkeypatch) -> None:
    """When this fails, vLLM has mended its attention, and `finite_cache` may go."""
    write = CPUAttentionBackendImpl.do_kv_cache_update
    monkeypatch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", getattr(write, "of_any_numbers", write))
    assert answer(torch.full((BLOCK, HEADS, SIZE), float("nan")), torch.float32).isnan().all()


def test_numbers_that_attention_can_compute_with_are_written_as_they_are() -> None:
    numbers = torch.tensor([0.0, -1.5, 1e15, 1e-30])
    assert torch.equal(finite_cache.finite(numbers), numbers)
