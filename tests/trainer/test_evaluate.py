"""Forgetting and exact match."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.config import TrainConfig
from trainer.data import IGNORED, batches
from trainer.evaluate import answers_match, forgetting_batches, language_loss


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def test_one_forward_pass_gives_the_exact_match_of_generation(model, tokenizer) -> None:
    rows = []
    for seed in range(8):
        prompt = torch.randint(5, 200, (1, 3 + seed), generator=torch.Generator().manual_seed(seed))
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        ids = answer[0].tolist()
        if seed % 2:
            ids[-1] = (ids[-1] + 1) % 200  # one wrong token
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt.shape[1] + ids[prompt.shape[1] :]})
    (batch,) = batches(rows, 8, tokenizer)
    assert answers_match(model, batch).tolist() == [True, False] * 4


def test_the_loss_is_a_mean_over_tokens_not_over_batches(model, tokenizer) -> None:
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (3, 20, 7)]
    assert language_loss(model, batches(rows, 1, tokenizer)) == pytest.approx(
        language_loss(model, batches(rows, 3, tokenizer)), rel=1e-5
    )


def test_the_default_forgetting_text_is_a_sample_of_the_base(model, tokenizer) -> None:
    torch.manual_seed(0)
    text = forgetting_batches(model, tokenizer, TrainConfig(forgetting_rows=20))
    assert sum(len(batch["input_ids"]) for batch in text) == 20
    for batch in text:
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            kept = ids[mask.bool()][1:]
            assert not (kept[:-1] == tokenizer.eos_token_id).any()  # only the last token may end the text
    # A model's loss on its own samples is its entropy; a random base is nearly uniform over its vocabulary.
    assert language_loss(model, text) == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), abs=0.2)


def test_forgetting_text_is_read_from_a_file(model, tokenizer, jsonl) -> None:
    file = jsonl([{"text": "one"}, {"text": "two"}, {"text": "three"}])
    text = forgetting_batches(model, tokenizer, TrainConfig(forgetting_data=str(file), forgetting_rows=2))
    assert [tokenizer.decode(ids[mask.bool()]) for b in text for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)] == ["one<|end|>", "two<|end|>"]  # fmt: skip  # noqa: E501


def test_text_of_the_base_ends_at_any_of_its_end_tokens(tiny_base, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    ends = [tokenizer.eos_token_id, *range(200, len(tokenizer))]
    model.generation_config.eos_token_id = ends
    model.generation_config.repetition_penalty = 1.3
    torch.manual_seed(0)
    for batch in forgetting_batches(model, tokenizer, TrainConfig(forgetting_rows=8)):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            text = ids[mask.bool()][1:].tolist()
            assert text
            assert not [token for token in text[:-1] if token in ends]
