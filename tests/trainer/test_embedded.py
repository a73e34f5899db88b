"""The embedded base and its tasks: split, reproducibility and size."""

import json
import random
from itertools import islice

import pytest
import torch

from tests.conftest import EMBEDDED
from trainer.base import load_base, load_tokenizer
from trainer.config import TrainConfig
from trainer.embedded import corpus, pretrain, stdlib, tasks


def text_of(row: tasks.Row) -> str:
    return json.dumps(row)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_rows_are_distinct_reproducible_and_disjoint_between_splits(task: str) -> None:
    train, test = (tasks.rows(task, test=split, n=n) for split, n in ((False, 2000), (True, 100)))
    assert len(train) == 2000
    assert len(test) == 100
    questions = [{json.dumps(r.get("prompt") or r["messages"][0]) for r in rows} for rows in (train, test)]
    assert not questions[0] & questions[1]
    assert len(set(map(text_of, train))) == 2000
    assert train == tasks.rows(task, test=False, n=2000)
    assert train != tasks.rows(task, test=False, n=2000, seed=1)


def test_the_splits_share_no_module_table_or_product() -> None:
    modules = [{path.split("/")[0].removesuffix(".py") for path, _ in stdlib.sources(held)} for held in (False, True)]
    assert not modules[0] & modules[1]
    assert all(len(found) > 20 for found in modules)
    for words in (tasks.TABLES, tasks.PRODUCTS):
        train, test = tasks._nouns(words, False, [*words, "other"]), tasks._nouns(words, True, [])
        assert not set(train) & set(test)
        assert set(train) | set(test) == {*words, "other"}
        assert len(words) == len(set(words))


def test_the_answer_of_a_signature_row_is_the_functions_arguments() -> None:
    for row in tasks.rows("signature", test=True, n=100):
        line = row["prompt"].removesuffix("\nArguments:")
        names = row["completion"].strip().split(", ")
        function = compile(f"{line} pass", "row", "exec", flags=0x1000000).co_consts  # annotations are not evaluated
        code = next(c for c in function if hasattr(c, "co_varnames"))
        assert set(code.co_varnames) - {"self", "cls"} == set(names)


def test_the_corpus_has_no_question_with_its_answer() -> None:
    rng = random.Random(1)
    streams = {name: make(rng, False, ()) for name, make in tasks.TASKS.items()}
    pieces = [corpus._unpaired(rng, streams) for _ in range(3000)]
    for question, answer in (("Table ", "SELECT "), (" order ", '"intent"')):
        assert any(question in piece for piece in pieces)
        assert any(answer in piece for piece in pieces)
        assert not any(question in piece and answer in piece for piece in pieces)
    assert not any(cue in piece for cue in ("SQL:", "Arguments:") for piece in pieces)


def test_the_same_seed_gives_the_same_corpus() -> None:
    first, again, other = (list(islice(corpus.documents(seed), 500)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_same_seed_gives_the_same_base_which_loads(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(pretrain, "TOKENIZER_TEXTS", 1000)
    for name in ("a", "b"):
        pretrain.pretrain(tmp_path / name, steps=2, seed=5)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    model, tokenizer = load_base(tmp_path / "a", TrainConfig()), load_tokenizer(tmp_path / "a", TrainConfig())
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(tokenizer("def f(a, b_c): 12")["input_ids"]) == "def f(a, b_c): 12"


def test_the_corpus_of_the_shipped_base_is_the_corpus_of_the_code() -> None:
    record = json.loads((EMBEDDED / "pretraining.json").read_text())
    if record["stdlib"] != stdlib.digest():
        pytest.skip(f"the corpus contains the standard library, and this one is not that of Python {record['python']}")
    assert record["corpus"] == pretrain.corpus_digest(record["seed"])


def test_the_shipped_base_is_small_bfloat16_with_a_chat_template() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 12_000_000
    model, tokenizer = load_base(EMBEDDED, TrainConfig()), load_tokenizer(EMBEDDED, TrainConfig())
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ == "LlamaForCausalLM"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>\nhi<|end|>\n<|assistant|>\n"
