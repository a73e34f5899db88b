"""Forward passes that continue earlier ones: the blocks that they skip, and that results do not change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from trainer.adapter import target_layers
from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.start.calibration import gram_matrices, layer_groups
from trainer.start.passes import Passes

BLOCKS = 4


def small(kind: str, **settings: Any) -> PreTrainedModel:
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 200}
    config = AutoConfig.for_model(kind, **widths, num_hidden_layers=BLOCKS, pad_token_id=0, use_cache=False, **settings)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    return model.from_config(config).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small("llama", num_key_value_heads=1)


@pytest.fixture
def rows() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 200, (2, 9), generator=generator) for _ in range(3)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


@pytest.fixture
def blocks_run(model: PreTrainedModel) -> Callable[[], list[int]]:
    """A function that returns the numbers of the blocks that have computed since its last call."""
    seen: list[int] = []
    for i, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, i=i: seen.append(i))

    def since_last_call() -> list[int]:
        found = seen.copy()
        seen.clear()
        return found

    return since_last_call


def one_by_one(model: PreTrainedModel, rows: list[Batch], layers: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
    return {name: gram_matrices(Passes(model, rows), {name: layer})[name].matrix for name, layer in layers.items()}


@pytest.mark.parametrize("memory", [1, 2 * 8 * 32**2, 10**9], ids=["one layer per group", "two", "one group"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("gpt_neox", {}),
        ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4}),
        ("bert", {}),
    ],
)
def test_gram_matrices_do_not_depend_on_the_groups(kind, settings, memory, rows) -> None:
    model = small(kind, **settings)
    targets = TrainConfig(target_modules=["query", "value"]) if kind == "bert" else TrainConfig()
    layers = target_layers(model, targets)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    passes = Passes(model, rows)
    found = {}
    for group in layer_groups(shapes, memory):
        found |= gram_matrices(passes, {name: layers[name] for name in group})
    for name, matrix in one_by_one(model, rows, layers).items():
        assert torch.equal(found[name].matrix, matrix), name


def test_a_pass_runs_only_the_blocks_between_the_last_pass_and_the_last_layer(model, rows, blocks_run) -> None:
    layers = [block.mlp.down_proj for block in model.model.layers]
    passes = Passes(model, rows)
    blocks_run()
    passes.run(0, layers[:2])
    assert blocks_run() == [0, 1]
    passes.run(0, layers[2:3])
    assert blocks_run() == [1, 2]
    passes.run(0, layers[2:])
    assert blocks_run() == [2, 3]
    passes.run(1, layers[2:3])  # this batch has no saved output yet
    assert blocks_run() == [0, 1, 2]
    passes.run(1, layers[:1])  # before the saved output: from the first block
    assert blocks_run() == [0]
    passes.run(1, [layers[3], model.lm_head])  # a layer outside the blocks needs the whole pass
    assert blocks_run() == [0, 1, 2, 3]


def test_dependent_blocks_are_not_skipped(rows) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor, side: list[torch.Tensor]) -> torch.Tensor:
            side.append(self.layer(x))
            return x + sum(side)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
            x = nn.functional.one_hot(input_ids % 8, 8).float()
            side: list[torch.Tensor] = []
            for block in self.blocks:
                x = block(x, side)
            return x

    torch.manual_seed(0)
    model = Model()
    layers = {str(i): block.layer for i, block in enumerate(model.blocks)}
    passes = Passes(model, rows)
    found = {name: gram_matrices(passes, {name: layer})[name].matrix for name, layer in layers.items()}
    for name, matrix in one_by_one(model, rows, layers).items():
        assert torch.equal(found[name], matrix)


def test_blocks_that_run_several_times_per_pass_are_not_skipped(rows) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 200}
    config = AutoConfig.for_model("albert", **settings, num_hidden_layers=4, num_hidden_groups=2, embedding_size=16)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    layers = target_layers(model, TrainConfig(target_modules=["ffn", "ffn_output"]))
    passes = Passes(model, rows)
    found = {name: gram_matrices(passes, {name: layer})[name].matrix for name, layer in layers.items()}
    for name, matrix in one_by_one(model, rows, layers).items():
        assert torch.equal(found[name], matrix)


def test_the_model_is_unchanged(model, rows) -> None:
    passes = Passes(model, rows)
    before = model(**{k: v for k, v in rows[0].items() if k != "labels"}).logits
    hooks = [len(module._forward_hooks) for module in model.modules()]
    for block in model.model.layers:
        passes.run(0, [block.mlp.up_proj])
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(**{k: v for k, v in rows[0].items() if k != "labels"}).logits, before)
