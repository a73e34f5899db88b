"""The grouped CPU path against float64 and against vLLM's own path, over everything a step can look like."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.layers import LogitsProcessorWithLoRA, LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from astra_serve.cpu_lora import ops
from astra_serve.cpu_lora.wrapper import GroupedPunicaWrapper, Groups, _recording_ranks

SLOTS, MAX_RANK, D_IN = 4, 16, 96
SLICES = (80, 16, 32)  # what the AVX-512 operator takes; test_ops has the shapes that it does not


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stacked(dtype: torch.dtype, ranks: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A and B of every slice, zero beyond each slot's rank, as the engine stores them."""
    a = [normal(SLOTS, 1, MAX_RANK, D_IN, dtype=dtype, seed=i) for i in range(len(SLICES))]
    b = [normal(SLOTS, 1, width, MAX_RANK, dtype=dtype, seed=9 + i) for i, width in enumerate(SLICES)]
    for slot, rank in enumerate(ranks):
        for i in range(len(SLICES)):
            a[i][slot, :, rank:] = 0
            b[i][slot, :, :, rank:] = 0
    return a, b


def wrapper(kind: type[PunicaWrapperCPU], slots: list[int], prompts: list[int] | None = None) -> PunicaWrapperCPU:
    """A wrapper whose step has one row per entry of `slots`; -1 is a request for the base."""
    made = kind(1024, 1024, "cpu", lora_config=SimpleNamespace(max_loras=SLOTS))
    ids = [None if slot == 1 else slot + 1 for slot in range(SLOTS)]  # slot 1 is empty
    mapping = LoRAMapping(
        tuple(0 if slot < 0 else slot + 1 for slot in slots),
        tuple(0 if slot < 0 else slot + 1 for slot in (slots if prompts is None else prompts)),
        is_prefill=True,
    )
    made.update_metadata(mapping, ids, SLOTS + 1, 100)
    return made


def reference(y, x, a, b, slots, scale=1.0) -> torch.Tensor:
    """y + scale B A x per row, in float64; rows of the base stay as they are."""
    result = y.double().clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            change = [b[i][slot, 0].double() @ (a[i][slot, 0].double() @ x[row].double()) for i in range(len(SLICES))]
            result[row] += scale * torch.cat(change)
    return result


SLOT_LISTS = st.lists(st.sampled_from([-1, 0, 2, 3]), min_size=1, max_size=64)
RANKS = st.lists(st.integers(1, MAX_RANK), min_size=SLOTS, max_size=SLOTS)


@pytest.mark.parametrize("linear", [ops.lora_linear, ops.fastest_lora_linear()], ids=["portable", "fastest"])
@settings(deadline=None, max_examples=60)
@given(slots=SLOT_LISTS, ranks=RANKS, dtype=st.sampled_from([torch.float32, torch.bfloat16]), known=st.booleans())
def test_every_row_gets_its_own_adapters_change_and_base_rows_get_none(linear, slots, ranks, dtype, known) -> None:
    a, b = stacked(dtype, ranks)
    x, y = normal(len(slots), D_IN, dtype=dtype, seed=3), normal(len(slots), sum(SLICES), dtype=dtype, seed=4)
    grouped = wrapper(GroupedPunicaWrapper, slots)
    grouped.linear = linear
    if known:
        grouped.ranks["linear"][:] = torch.tensor(ranks)
    expected = reference(y, x, a, b, slots, scale=0.5)
    before = y.clone()
    grouped.add_lora_linear(y, x, tuple(a), tuple(b), 0.5, SLICES)
    base_rows = torch.tensor(slots) < 0
    assert torch.equal(y[base_rows], before[base_rows])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.8}
    torch.testing.assert_close(y.double(), expected, **tolerance)


@pytest.mark.parametrize("n", [1, 2, 31, 512])
@pytest.mark.parametrize("mix", [[0], [0, 2], [3, 0, 0, 2]], ids=str)
def test_equal_to_the_stock_path_where_every_request_has_an_adapter(n: int, mix: list[int]) -> None:
    slots = (mix * n)[:n]
    a, b = stacked(torch.bfloat16, [16, 1, 8, 3])
    x = normal(n, D_IN, dtype=torch.bfloat16, seed=3)
    outputs = []
    for kind in (PunicaWrapperCPU, GroupedPunicaWrapper):
        y = normal(n, sum(SLICES), dtype=torch.bfloat16, seed=4)
        wrapper(kind, slots).add_lora_linear(y, x, tuple(a), tuple(b), 1.0, SLICES)
        outputs.append(y.float())
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=0.6)


def test_the_stock_path_serves_the_base_with_the_last_slots_adapter_in_a_mixed_batch() -> None:
    """Why the plugin is not only about speed. When this fails, vLLM has mended it, and the docstring can say so."""
    a, b = stacked(torch.float32, [16] * 4)
    x, y = normal(2, D_IN, seed=3), torch.zeros(2, sum(SLICES))
    wrapper(PunicaWrapperCPU, [-1, 0]).add_lora_linear(y, x, tuple(a), tuple(b), 1.0, SLICES)
    torch.testing.assert_close(y.double(), reference(torch.zeros_like(y), x, a, b, [3, 0]), rtol=1e-4, atol=1e-4)


def test_sharded_shrink_and_expand_together_are_the_linear_path() -> None:
    slots = [0, -1, 2, 2, 0]
    a, b = stacked(torch.float32, [16, 1, 5, 3])
    x, y = normal(5, D_IN, seed=3), normal(5, sum(SLICES), seed=4)
    expected = reference(y, x, a, b, slots)
    grouped = wrapper(GroupedPunicaWrapper, slots)
    buffers = torch.zeros(len(SLICES), 5, MAX_RANK)
    grouped.add_shrink(buffers, x, tuple(a), 1.0)
    grouped.add_expand(y, buffers, tuple(b), SLICES, offset_start=0, add_input=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_expand_can_replace_instead_of_add_and_start_at_an_offset() -> None:
    _, b = stacked(torch.float32, [16] * 4)
    inner, y = normal(1, 2, MAX_RANK, seed=5), torch.full((2, 5 + SLICES[0]), 7.0)
    wrapper(GroupedPunicaWrapper, [0, -1]).add_expand(y, inner, (b[0],), SLICES[:1], offset_start=5, add_inputs=False)
    torch.testing.assert_close(y[0, 5:], b[0][0, 0] @ inner[0, 0])
    assert (y[0, :5] == 7).all()
    assert (y[1] == 7).all()


def test_embeddings_expand_the_rows_that_the_engine_looked_up() -> None:
    _, b = stacked(torch.float32, [16] * 4)
    inner, y = normal(3, MAX_RANK, seed=5), normal(3, SLICES[0], seed=6)
    expected = y.clone()
    for row, slot in ((0, 2), (2, 0)):
        expected[row] += b[0][slot, 0] @ inner[row]
    wrapper(GroupedPunicaWrapper, [2, -1, 0]).add_lora_embedding(y, inner, b[0], add_input=True)
    torch.testing.assert_close(y, expected)


def test_logits_follow_the_samplers_mapping_not_the_tokens() -> None:
    a, b = stacked(torch.float32, [16] * 4)
    x, y = normal(2, D_IN, seed=3), normal(2, SLICES[0] + 5, seed=4)  # the engine pads the vocabulary
    before = y.clone()
    wrapper(GroupedPunicaWrapper, [0, 0, 0, -1, -1], prompts=[2, -1]).add_lora_logits(y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y[0, : SLICES[0]], before[0, : SLICES[0]] + b[0][2, 0] @ (a[0][2, 0] @ x[0]))
    assert torch.equal(y[0, SLICES[0] :], before[0, SLICES[0] :])
    assert torch.equal(y[1], before[1])


def test_rows_are_grouped_by_slot_in_their_order_and_base_rows_belong_to_none() -> None:
    groups = Groups(8, SLOTS)
    groups.update(torch.tensor([2, 2, -1, 0, 3, 0]))
    assert groups.starts.tolist() == [1, 3, 3, 5, 6]
    assert groups.rows[:6].tolist() == [2, 3, 5, 0, 1, 4]
    groups.update(torch.tensor([-1, -1]))
    assert groups.starts.tolist() == [2] * 5


def test_an_adapters_true_ranks_are_known_once_it_is_in_a_slot() -> None:
    """By kind of layer: without a rank nothing is computed. The real manager needs a model: this is its outside."""

    def weights(lora_a) -> SimpleNamespace:
        return SimpleNamespace(lora_a=lora_a)

    layers = {"o": weights(torch.zeros(3, 8)), "qkv": weights([torch.zeros(5, 8), None]), "head": None, "embed": None}
    grouped = wrapper(GroupedPunicaWrapper, [0])
    manager = SimpleNamespace(
        lora_index_to_id=[None, 7],
        modules={**dict.fromkeys(layers), "head": object.__new__(LogitsProcessorWithLoRA)},
        _registered_adapters={7: layers},
        _get_lora_layer_weights=lambda adapter, name: adapter[name],
        punica_wrapper_mapping={"model": grouped},
    )
    activate = _recording_ranks(lambda _self, _id: True)
    assert activate(manager, 7) is True
    assert {kind: int(ranks[1]) for kind, ranks in grouped.ranks.items()} == {"linear": 5, "embedding": 0, "logits": 0}
    layers["head"] = weights(torch.zeros(6, 8))
    activate(manager, 7)
    assert grouped.ranks["logits"][1] == 6


@pytest.mark.parametrize("linear", [ops.lora_linear, ops.fastest_lora_linear()], ids=["portable", "fastest"])
def test_a_slot_of_rank_0_is_left_out(linear) -> None:
    a, b = stacked(torch.bfloat16, [16] * 4)
    x, y = normal(3, D_IN, dtype=torch.bfloat16, seed=3), normal(3, sum(SLICES), dtype=torch.bfloat16, seed=4)
    grouped, before = wrapper(GroupedPunicaWrapper, [0, 2, 0]), y.clone()
    grouped.linear = linear
    grouped.ranks["linear"][:] = torch.tensor([0, 0, 16, 0])
    grouped.add_lora_linear(y, x, tuple(a), tuple(b), 1.0, SLICES)
    assert torch.equal(y[::2], before[::2])
    assert not torch.equal(y[1], before[1])
