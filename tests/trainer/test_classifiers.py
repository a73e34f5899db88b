"""Classifiers of several architectures: their heads are trained, named and loaded by plain PEFT."""

import pytest
from transformers import AutoModelForSequenceClassification

from astra_serve.adapters.admission import open_base
from converter.adapter_dir import MalformedAdapter, load_astra, load_lora
from converter.cli import main as convert
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


def test_the_server_refuses_a_classifier_with_the_reason(base_of, classes, tmp_path) -> None:
    base, out = base_of("bert"), tmp_path / "out"
    assert astra_train(base, classes, out, "task=classification", "forgetting_rows=0", "steps=1") == 0
    assert convert([str(out), str(tmp_path / "lora")]) == 0
    with pytest.raises(MalformedAdapter, match="is a classifier, whose head is trained in full"):
        open_base(str(base)).check(tmp_path / "lora")


def test_a_layer_of_the_head_cannot_be_named(base_of, classes, tmp_path, capsys) -> None:
    settings = ("task=classification", "target_modules=[out_proj]")
    assert astra_train(base_of("roberta"), classes, tmp_path / "out", *settings) == 2
    assert "'out_proj' belongs to the classifier's head, which is trained in full" in capsys.readouterr().err
