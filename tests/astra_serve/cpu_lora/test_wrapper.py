"""The grouped CPU path against float64 and against vLLM's own path, over everything a step can look like."""

import inspect
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora import layers as lora_layers
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ClassificationHeadWithLoRA,
    FusedMoEWithLoRA,
    LogitsProcessorWithLoRA,
    LoRAMapping,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from astra_serve.cpu_lora import ops
from astra_serve.cpu_lora.wrapper import (
    KINDS,
    UNKNOWN_RANK,
    GroupedPunicaWrapper,
    Groups,
    _recording_ranks,
    largest_ranks,
)

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


def activation(grouped: PunicaWrapperCPU, layers: dict, modules: dict) -> SimpleNamespace:
    """The part of the engine's adapter manager that the recorder reads. Adapter 7 is in slot 1."""
    return SimpleNamespace(
        lora_index_to_id=[None, 7],
        modules=modules,
        _registered_adapters={7: layers},
        _get_lora_layer_weights=lambda adapter, name: adapter.get(name),
        punica_wrapper_mapping={"model": grouped},
    )


def test_an_adapters_true_ranks_are_known_once_it_is_in_a_slot_and_replace_the_last_ones() -> None:
    """By kind of layer: where an adapter has none, nothing is computed."""
    modules = {
        "o": None,
        "qkv": None,
        "head": object.__new__(LogitsProcessorWithLoRA),
        "score": object.__new__(ClassificationHeadWithLoRA),
        "embed": object.__new__(VocabParallelEmbeddingWithLoRA),
        "experts": object.__new__(FusedMoEWithLoRA),
    }
    grouped = wrapper(GroupedPunicaWrapper, [0])
    activate = _recording_ranks(lambda _self, _id: True)
    for layers, expected in (
        ({"o": [3], "qkv": [5, None]}, {"linear": 5}),
        ({"head": [6]}, {"logits": 6}),
        ({"score": [4], "embed": [2]}, {"embedding": 2, "logits": 4}),
        ({"experts": [7, 7, 3]}, {"experts": 7}),
    ):
        made = {
            name: SimpleNamespace(lora_a=[None if rank is None else torch.zeros(rank, 8) for rank in ranks])
            for name, ranks in layers.items()
        }
        assert activate(activation(grouped, made, modules), 7) is True
        assert {kind: int(ranks[1]) for kind, ranks in grouped.ranks.items()} == dict.fromkeys(KINDS, 0) | expected


def test_an_activation_that_fails_leaves_no_rank_of_the_adapter_before_it() -> None:
    def fail(*_) -> bool:
        raise MemoryError

    grouped = wrapper(GroupedPunicaWrapper, [0])
    grouped.ranks["linear"][:] = 0
    with pytest.raises(MemoryError):
        _recording_ranks(fail)(activation(grouped, {}, {}), 7)
    assert (grouped.ranks["linear"] == UNKNOWN_RANK).all()


@pytest.mark.parametrize("module", lora_layers.__all__)
def test_every_layer_of_the_engine_has_its_kind(module: str) -> None:
    """A layer taken for another kind would be left out: this fails when a new engine has a new one."""
    kind = getattr(lora_layers, module)
    if not isinstance(kind, type) or not issubclass(kind, BaseLayerWithLoRA):
        pytest.skip("not a layer")
    called = set(re.findall(r"\.(add_lora_\w+)\(", inspect.getsource(kind)))
    weights = {"x": SimpleNamespace(lora_a=torch.zeros(3, 8))}
    known = [name for name, rank in largest_ranks({"x": object.__new__(kind)}, weights).items() if rank]
    assert (known == ["logits"]) == ("add_lora_logits" in called)
    assert (known == ["embedding"]) == ("add_lora_embedding" in called)
    assert (known == ["experts"]) == issubclass(kind, FusedMoEWithLoRA)


@pytest.mark.parametrize("linear", [ops.lora_linear, ops.fastest_lora_linear()], ids=["portable", "fastest"])
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_one_compiled_model_serves_every_mix_of_adapters(linear) -> None:
    """The data that change from step to step are in tensors: the engine compiles without guards."""
    a, b = stacked(torch.bfloat16, [16, 16, 8, 16])
    x, y = normal(6, D_IN, dtype=torch.bfloat16, seed=3), normal(6, sum(SLICES), dtype=torch.bfloat16, seed=4)
    grouped = wrapper(GroupedPunicaWrapper, [0, 0, 2, -1, 2, 3])
    grouped.linear = linear

    @torch.compile(fullgraph=True, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe})
    def model(x: torch.Tensor) -> torch.Tensor:
        out = y * 1
        grouped.add_lora_linear(out, x, tuple(a), tuple(b), 1.0, SLICES)
        return out + 0

    for slots in ([0, 0, 2, -1, 2, 3], [3, -1, -1, 0, 0, 2], [-1] * 6):
        ids = [None if slot == 1 else slot + 1 for slot in range(SLOTS)]
        mapping = tuple(0 if slot < 0 else slot + 1 for slot in slots)
        grouped.update_metadata(LoRAMapping(mapping, mapping, is_prefill=True), ids, SLOTS + 1, 100)
        torch.testing.assert_close(model(x).double(), reference(y, x, a, b, slots), rtol=2e-2, atol=0.8)
    grouped.update_metadata(LoRAMapping((1,) * 6, (1,) * 6, is_prefill=True), ids, SLOTS + 1, 100)
    grouped.ranks["linear"][0] = 0
    assert torch.equal(model(x), y)


def test_prompt_logprobs_use_the_adapter_of_the_only_request_and_none_with_several() -> None:
    """Then the engine asks for the logits of one request's prompt while the mapping is that of the sampled rows."""
    a, b = stacked(torch.float32, [16] * 4)
    x = normal(5, D_IN, seed=3)
    y = torch.zeros(5, SLICES[0])
    wrapper(GroupedPunicaWrapper, [2] * 5, prompts=[2]).add_lora_logits(y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y, x @ a[0][2, 0].T @ b[0][2, 0].T)
    several = wrapper(GroupedPunicaWrapper, [2, 0, 0], prompts=[2, 0, 0])
    before = y.clone()
    several.add_lora_logits(y, x, a[0], b[0], 1.0)
    assert torch.equal(y, before)


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
