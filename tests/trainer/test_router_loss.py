"""Models whose config names the number of experts differently, or no experts, train, too."""

import json

from tests.trainer.test_train import astra_train
from tests.trainer.tiny_models import decoder, save_model


def test_a_config_with_local_experts_alone_trains_and_stays_as_it_is(tokenizer, jsonl, rows, tmp_path) -> None:
    make = decoder("PhimoeForCausalLM", "PhimoeConfig", num_local_experts=4, num_key_value_heads=2)
    base = save_model(make, tmp_path / "base", tokenizer)
    assert astra_train(base, jsonl(rows), tmp_path / "out", "method=full", "steps=1", "forgetting_rows=0") == 0
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
    assert "num_experts" not in after
    assert after["num_local_experts"] == before["num_local_experts"]


def test_a_dense_model_of_a_family_with_experts_trains(tokenizer, jsonl, rows, tmp_path) -> None:
    layers = {"num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["attention", "attention"]}
    make = decoder("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", mamba_n_heads=4, **layers)
    base = save_model(make, tmp_path / "base", tokenizer)
    assert astra_train(base, jsonl(rows), tmp_path / "out", "steps=1", "forgetting_rows=0") == 0
