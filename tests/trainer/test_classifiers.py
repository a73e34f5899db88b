"""Classifiers of several architectures: their heads are trained, named and loaded by plain PEFT."""

import pytest
from transformers import AutoModelForSequenceClassification

from converter.adapter_dir import load_astra, load_lora
from tests.trainer.test_train import astra_train
from tests.trainer.tiny_models import check_against_peft

# transformers compiles functions of DeBERTa with it at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture
def classes(jsonl):
    return jsonl(
        [{"text": f"{'odd' if i % 2 else 'even'} {i}", "label": "odd" if i % 2 else "even"} for i in range(16)]
    )


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", ["bert.pooler", "classifier"]),
        ("roberta", ["classifier"]),
        ("electra", ["classifier"]),
        ("deberta-v2", ["classifier", "pooler"]),
        ("t5", ["classification_head"]),
        ("bart", ["classification_head"]),
        ("llama", ["score"]),
        ("gpt2", ["score"]),
        ("gemma3", ["score"]),
        ("qwen3_5", ["score"]),
    ],
)
def test_a_classifier_trains_converts_and_loads_in_peft(name, heads, base_of, classes, tmp_path) -> None:
    base, out = base_of(name), tmp_path / "out"
    assert astra_train(base, classes, out, "task=classification", "forgetting_rows=0", "steps=3") == 0
    assert load_astra(out).head
    check_against_peft(base, out, tmp_path / "lora", AutoModelForSequenceClassification)
    assert load_lora(tmp_path / "lora").config["modules_to_save"] == heads


def test_a_layer_of_the_head_cannot_be_named(base_of, classes, tmp_path, capsys) -> None:
    settings = ("task=classification", "target_modules=[out_proj]")
    assert astra_train(base_of("roberta"), classes, tmp_path / "out", *settings) == 2
    assert "'out_proj' belongs to the classifier's head, which is trained in full" in capsys.readouterr().err
