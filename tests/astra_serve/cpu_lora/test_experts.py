"""The experts' operator against float64, and the engine's choice of it."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from astra_serve.cpu_lora import experts

SLOTS, EXPERTS, TOP_K, WIDTH, INNER, MAX_RANK = 3, 5, 2, 16, 12, 8
RANKS = [8, 3, 0]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(fused: bool, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """The stacked A and B of gate and up, in one tensor or in two, and of down; what is beyond a rank is not zero."""
    widths = [2 * INNER] if fused else [INNER, INNER]
    return {
        "a13": [normal(SLOTS, EXPERTS, MAX_RANK, WIDTH, seed=i, dtype=dtype) for i, _ in enumerate(widths)],
        "b13": [normal(SLOTS, EXPERTS, width, MAX_RANK, seed=5 + i, dtype=dtype) for i, width in enumerate(widths)],
        "a2": [normal(SLOTS, EXPERTS, MAX_RANK, INNER, seed=7, dtype=dtype)],
        "b2": [normal(SLOTS, EXPERTS, WIDTH, MAX_RANK, seed=8, dtype=dtype)],
    }


def expected(x, w13, w2, weights, ids, lora, slots, activation) -> torch.Tensor:
    """The operator's definition, row by row: the weights of each expert with the row's adapter."""
    result = torch.zeros(len(x), WIDTH, dtype=torch.float64)
    for row, slot in enumerate(slots):
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            first, second = w13[expert].double(), w2[expert].double()
            if slot >= 0:
                rank = RANKS[slot]
                products = [
                    b[slot, expert, :, :rank].double() @ a[slot, expert, :rank].double()
                    for a, b in zip(lora["a13"], lora["b13"], strict=True)
                ]
                first = first + torch.cat(products)
                second = (
                    second
                    + lora["b2"][0][slot, expert, :, :rank].double() @ lora["a2"][0][slot, expert, :rank].double()
                )
            gate, up = (first @ x[row].double()).chunk(2)
            result[row] += weight * (second @ (activation(gate) * up))
    return result


def groups(slots: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = torch.tensor(slots)
    starts = torch.bincount(found + 1, minlength=SLOTS + 1).cumsum(0).int()
    return torch.argsort(found, stable=True).int(), starts, torch.tensor(RANKS, dtype=torch.int32)


def run(x, w13, w2, weights, ids, lora, slots, activation=MoEActivation.SILU) -> torch.Tensor:
    y = torch.full((len(x), WIDTH), 7.0, dtype=x.dtype)  # what the memory held before does not count
    experts.lora_experts(y, x, w13, w2, weights, ids, *lora.values(), *groups(slots), activation.value)
    return y


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=9),
    st.booleans(),
    st.sampled_from(list(experts._ACTIVATIONS)),
)
def test_every_row_has_its_experts_with_its_adapter(slots, fused, activation) -> None:
    n = len(slots)
    x, w13, w2 = (
        normal(n, WIDTH, seed=1),
        normal(EXPERTS, 2 * INNER, WIDTH, seed=2),
        normal(EXPERTS, WIDTH, INNER, seed=3),
    )
    ids = torch.stack(
        [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(i))[:TOP_K] for i in range(n)]
    ).int()
    weights, lora = normal(n, TOP_K, seed=4).softmax(-1), layer(fused, torch.float32)
    y = run(x, w13, w2, weights, ids, lora, slots, activation)
    reference = expected(x, w13, w2, weights, ids, lora, slots, experts._ACTIVATIONS[activation])
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_does_not_depend_on_the_other_rows(dtype) -> None:
    """Nor does a NaN in one of them reach another."""
    x, w13, w2 = (
        normal(*shape, dtype=dtype) for shape in ((3, WIDTH), (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER))
    )
    ids, weights = torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.full((3, TOP_K), 0.5)
    lora = layer(fused=False, dtype=dtype)
    alone = run(x[:1], w13, w2, weights[:1], ids[:1], lora, [-1])
    x[2] = float("nan")
    together = run(x, w13, w2, weights, ids, lora, [-1, 0, 1])
    torch.testing.assert_close(together[0], alone[0], rtol=1e-2, atol=1e-2)
    assert together[:2].isfinite().all()
    assert together[2].isnan().all()


def test_rows_beyond_the_step_have_no_adapter_and_a_chosen_number_beyond_the_experts_is_no_error() -> None:
    x, w13, w2 = normal(3, WIDTH), normal(EXPERTS, 2 * INNER, WIDTH), normal(EXPERTS, WIDTH, INNER)
    ids, weights = torch.tensor([[0, 1], [0, 1], [-7, 99]], dtype=torch.int32), torch.full((3, TOP_K), 0.5)
    lora = layer(fused=False, dtype=torch.float32)
    base = run(x, w13, w2, weights, ids, lora, [-1, -1, -1])
    padded = run(x, w13, w2, weights, ids, lora, [-1, 0])
    torch.testing.assert_close(padded[[0, 2]], base[[0, 2]])
    assert not torch.allclose(padded[1], base[1])


def test_a_layer_without_lora_is_that_of_the_base() -> None:
    """--lora-target-modules may leave the experts out: the engine then gives the layer no adapters at all."""
    x, w13, w2 = normal(3, WIDTH), normal(EXPERTS, 2 * INNER, WIDTH), normal(EXPERTS, WIDTH, INNER)
    ids, weights = torch.tensor([[0, 1], [3, 1], [4, 2]], dtype=torch.int32), normal(3, TOP_K, seed=4).softmax(-1)
    lora, made = layer(fused=False, dtype=torch.float32), object.__new__(experts.LoraExperts)
    for on_input, factors in ((False, weights), (True, torch.ones_like(weights))):
        y = torch.empty_like(x)
        made.apply(
            output=y, hidden_states=x, w1=w13, w2=w2, topk_weights=weights, topk_ids=ids, activation=MoEActivation.SILU,
            global_num_experts=EXPERTS, apply_router_weight_on_input=on_input,
        )  # fmt: skip
        torch.testing.assert_close(y, run(x, w13, w2, factors, ids, lora, [-1, -1, -1]))


def test_the_operator_passes_pytorchs_own_checks() -> None:
    x, w13, w2 = normal(2, WIDTH), normal(EXPERTS, 2 * INNER, WIDTH), normal(EXPERTS, WIDTH, INNER)
    ids, weights = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32), torch.full((2, TOP_K), 0.5)
    lora = layer(fused=False, dtype=torch.float32)
    arguments = (torch.zeros(2, WIDTH), x, w13, w2, weights, ids, *lora.values(), *groups([0, -1]), "silu")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(experts.lora_experts, arguments, test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")


@pytest.fixture
def select(monkeypatch):
    """The engine's function that selects the code of experts, with the plugin's in front; put back afterwards."""
    found = method.select_unquantized_moe_backend
    monkeypatch.setattr(method, "select_unquantized_moe_backend", getattr(found, "without_lora", found))
    experts.compute_experts_here()
    experts.compute_experts_here()  # a second time changes nothing
    with set_current_vllm_config(with_lora(None)):
        yield method.select_unquantized_moe_backend


def with_lora(targets: list[str] | None) -> VllmConfig:
    config = VllmConfig()
    config.lora_config = LoRAConfig(max_lora_rank=8, target_modules=targets)
    return config


def config(monkeypatch, **changes):
    """Return what the selection reads of a layer's config; whether vLLM's own checks pass is in `supported`."""
    supported = changes.pop("supported", (True, None))
    monkeypatch.setattr(experts.LoraExperts, "is_supported_config", staticmethod(lambda *_: supported))
    return SimpleNamespace(**{"is_lora_enabled": True, "has_bias": False, **changes})


def test_with_lora_the_engine_computes_experts_by_the_plugin(select, monkeypatch) -> None:
    backend, found = select(config(monkeypatch))
    assert (backend.name, found) == ("CPU", experts.LoraExperts)
    assert found.supports_lora()


@pytest.mark.parametrize(("targets", "adapted"), [(["q_proj", "gate_proj"], False), (["q_proj", "experts"], True)])
def test_experts_that_no_adapter_may_change_are_computed_as_without_lora(targets, adapted, monkeypatch) -> None:
    """Also those that the plugin cannot compute."""
    monkeypatch.setattr(method, "select_unquantized_moe_backend", lambda moe_config: (moe_config, "vLLM's own"))
    experts.compute_experts_here()
    asked = config(monkeypatch, has_bias=not adapted)
    with set_current_vllm_config(with_lora(targets)):
        found = method.select_unquantized_moe_backend(asked)[1]
    assert found == (experts.LoraExperts if adapted else "vLLM's own")
    assert asked.is_lora_enabled is adapted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"has_bias": True}, "a bias"), ({"supported": (False, "kernel does not support x")}, "support x")],
)
def test_experts_that_cannot_be_computed_end_the_start_with_the_reason(changes, reason, select, monkeypatch) -> None:
    with pytest.raises(ValueError, match=f"LoRA cannot be served on a CPU .*{reason}"):
        select(config(monkeypatch, **changes))


def test_without_the_plugin_experts_need_triton_where_lora_is_on(select, monkeypatch) -> None:
    """When this fails, vLLM computes experts with LoRA on a CPU, and `experts` may go."""
    assert select.without_lora(config(monkeypatch))[0].name == "TRITON"
