"""Astra from Python: what can be given, what is written, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from converter.adapter_dir import OutputExists, WrongBase, load_astra
from tests.trainer.test_train import astra_train
from trainer import get_astra_model, initialize_lora_astra_weights, load_adapter, save_adapter, save_lora
from trainer.errors import ConfigError, DataError, TargetError
from trainer.exact_start import AstraModelForCausalLM

IDS = torch.arange(5, 45).view(2, 20)
CONFIG = LoraConfig(r=4, lora_alpha=8)


def load(base: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    """Train in a plain loop."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def start(base: Path, **options) -> PeftModel:
    return get_astra_model(load(base), CONFIG, [{"input_ids": ids} for ids in IDS.tolist()], **options)


def test_a_loader_tokens_and_text_give_the_same_start(tiny_base: Path, tokenizer) -> None:
    texts = ["how many rows has the table", "select all names of the towns"]
    tokens = [{"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]} for text in texts]
    loader = DataLoader([{"input_ids": torch.tensor(row["input_ids"])} for row in tokens])
    for subspace in ("tail", "principal"):
        states = [
            get_astra_model(load(tiny_base), CONFIG, data, tokenizer, subspace=subspace).state_dict()
            for data in (loader, tokens, texts, [{"text": text} for text in texts])
        ]
        for state in states[1:]:
            assert all(torch.allclose(value, states[0][name], atol=1e-4) for name, value in state.items())


def test_preference_rows_calibrate_on_the_chosen_answers(tiny_base: Path, tokenizer) -> None:
    rows = [{"prompt": "how many rows", "chosen": " ten", "rejected": " none at all"}]
    same = [{"prompt": "how many rows", "completion": " ten"}]
    of_preference, of_answers = (
        get_astra_model(load(tiny_base), CONFIG, data, tokenizer).state_dict() for data in (rows, same)
    )
    assert all(torch.equal(value, of_answers[name]) for name, value in of_preference.items())


def test_the_start_changes_nothing_and_trains_the_moves_alone(tiny_base: Path) -> None:
    model = start(tiny_base)
    assert torch.equal(logits(model), logits(load(tiny_base)))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"move"}


@pytest.mark.parametrize("train_b", [True, False])
def test_a_model_that_peft_has_made_gets_the_same_start_in_place(train_b, tiny_base: Path) -> None:
    rows = [{"input_ids": ids} for ids in IDS.tolist()]
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(tiny_base), copy.deepcopy(config))
    initialize_lora_astra_weights(model, rows, train_b=train_b)
    expected = get_astra_model(load(tiny_base), config, rows, train_b=train_b)
    assert isinstance(model, AstraModelForCausalLM)
    assert torch.equal(logits(model), logits(load(tiny_base)))
    states = model.state_dict(), expected.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    trained(model)
    trained(expected)
    torch.testing.assert_close(logits(model), logits(expected))
    found = model.peft_config["default"]
    assert (found.r, found.lora_alpha, found.rank_pattern["q_proj"]) == ((8, 16, 4) if train_b else (4, 8, 2))


def test_a_model_that_was_trained_is_not_restarted(tiny_base: Path) -> None:
    rows = [{"input_ids": ids} for ids in IDS.tolist()]
    model = get_peft_model(load(tiny_base), LoraConfig(r=4, target_modules="all-linear"))
    initialize_lora_astra_weights(model, rows)
    with pytest.raises(ConfigError, match="has left its start already"):
        initialize_lora_astra_weights(model, rows)


def test_attention_of_a_trainer_of_its_own_is_left_alone_for_the_calibration(tiny_base: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("packed rows only")

    AttentionInterface.register("packed_rows_only", refuse)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="packed_rows_only")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    initialize_lora_astra_weights(model, [{"input_ids": ids} for ids in IDS.tolist()])
    assert model.get_base_model().config._attn_implementation == "packed_rows_only"


@pytest.mark.parametrize("train_b", [True, False])
def test_the_saved_lora_has_the_logits_of_the_trained_model(train_b, tiny_base, tmp_path) -> None:
    model = trained(start(tiny_base, train_b=train_b))
    done = save_lora(model, tmp_path / "lora", max_kl=1e-4)
    assert done.provenance["probe"]
    loaded = PeftModel.from_pretrained(load(tiny_base), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(load(tiny_base))).abs().max() > 0.05


def test_training_goes_on_from_a_saved_adapter(tiny_base: Path, tmp_path: Path) -> None:
    model = trained(start(tiny_base))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load(tiny_base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    save_lora(trained(again), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(load(tiny_base), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(again), rtol=1e-4, atol=1e-4)


def test_training_goes_on_from_an_adapter_of_the_command_line(tiny_base, jsonl, rows, tmp_path) -> None:
    options = ("rank=4", "steps=2", "learning_rate=1e-2", "forgetting_rows=0")
    for method in ("astra", "lora"):
        assert astra_train(tiny_base, jsonl(rows), tmp_path / method, f"method={method}", *options) == 0
        model = load_adapter(load(tiny_base), tmp_path / method)
        save_lora(model, tmp_path / f"{method}-lora")
        loaded = PeftModel.from_pretrained(load(tiny_base), tmp_path / f"{method}-lora")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(model), logits(load(tiny_base)), atol=1e-4)


def test_a_classifier_is_saved_with_its_head(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    labels = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(base_of("bert"), **labels)
    model = get_astra_model(base, LoraConfig(r=4), [{"input_ids": ids} for ids in IDS.tolist()])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.eval()(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert load_astra(tmp_path / "adapter").config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    fresh = AutoModelForSequenceClassification.from_pretrained(base_of("bert"), **labels)
    torch.testing.assert_close(logits(load_adapter(fresh, tmp_path / "adapter")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(use_dora=True), "an Astra adapter has no use_dora: leave it at its default"),
        (LoraConfig(lora_dropout=0.1), "an Astra adapter has no lora_dropout"),
        (LoraConfig(init_lora_weights="pissa"), "an Astra adapter has no init_lora_weights"),
        (LoraConfig(target_modules=".*q_proj"), "target_modules must be a list of names, or all-linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_an_adapter_cannot_have_is_refused(config, reason, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        get_astra_model(load(tiny_base), config, [{"input_ids": [5, 6]}])


def test_unusable_data_and_targets_are_refused(tiny_base: Path) -> None:
    with pytest.raises(DataError, match="data is empty"):
        get_astra_model(load(tiny_base), CONFIG, [])
    with pytest.raises(DataError, match="rows of text need the tokenizer"):
        get_astra_model(load(tiny_base), CONFIG, ["a text"])
    with pytest.raises(TargetError, match="no linear layer is named 'query'"):
        get_astra_model(load(tiny_base), LoraConfig(target_modules=["query"]), [{"input_ids": [5, 6]}])
    with pytest.raises(ConfigError, match="has an adapter already"):
        get_astra_model(start(tiny_base), CONFIG, [{"input_ids": [5, 6]}])


def test_a_folder_is_not_overwritten_and_another_base_is_refused(tiny_base, base_of, tmp_path) -> None:
    save_adapter(start(tiny_base), tmp_path / "adapter")
    with pytest.raises(OutputExists):
        save_adapter(start(tiny_base), tmp_path / "adapter")
    with pytest.raises(WrongBase, match="was trained on another base"):
        load_adapter(load(base_of("mixtral")), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"use PEFT's save_pretrained"):
        save_adapter(PeftModel(load(tiny_base), LoraConfig(target_modules=["q_proj"])), tmp_path / "other")


def test_a_base_without_a_folder_cannot_be_saved_and_says_so(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = get_astra_model(LlamaForCausalLM(config), CONFIG, [{"input_ids": ids} for ids in IDS.tolist()])
    with pytest.raises(Exception, match="the base has no folder: load it with from_pretrained"):
        save_adapter(model, tmp_path / "adapter")
