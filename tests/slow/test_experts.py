"""A mixture of experts on the real engine: an adapter of attention, a dense layer, shared experts and experts."""

import httpx
import pytest
import torch
import transformers as hf

from converter.adapter_dir import load_astra
from tests.support.server import astra_serve
from tests.trainer.test_train import astra_train
from tests.trainer.tiny_models import add_change, convert, save_base

PROMPTS = [list(range(10, 22)), list(range(100, 117)), [30, 31, 32]]


@torch.no_grad()
def expected(model: hf.PreTrainedModel) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in PROMPTS]


@pytest.mark.timeout(500)
def test_experts_answer_as_the_trained_model_does(tokenizer, jsonl, rows, tmp_path) -> None:
    """The log probabilities of the base and of the adapter, in one batch, are those that transformers computes."""
    base = save_base("glm4_moe", tmp_path / "base", tokenizer, head_dim=32)  # a size that the engine's attention has
    targets = "target_modules=[q_proj, gate_proj, up_proj, down_proj, experts]"
    options = ["method=lora", "rank=4", "steps=8", "learning_rate=3e-2", "forgetting_rows=0", targets]
    assert astra_train(base, jsonl(rows), tmp_path / "astra", *options) == 0
    assert convert([str(tmp_path / "astra"), str(tmp_path / "lora")]) == 0
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    answers = {"base": expected(model)}
    add_change(model, load_astra(tmp_path / "astra"))
    answers["tuned"] = expected(model)
    assert (answers["tuned"][0] - answers["base"][0]).abs().max() > 0.1

    options = ["--base", str(base), "--adapter", f"tuned={tmp_path / 'lora'}", "--enforce-eager"]
    options += ["--dtype", "float32", "--max-model-len", "64"]
    with astra_serve(options, tmp_path / "server.log") as server:
        for name, wanted in answers.items():
            body = {
                "model": name,
                "prompt": PROMPTS,
                "max_tokens": 1,
                "logprobs": 5,
                "return_tokens_as_token_ids": True,
            }
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.is_success, answer.text
            for choice, distribution in zip(answer.json()["choices"], wanted, strict=True):
                (found,) = choice["logprobs"]["top_logprobs"]
                for token, logprob in found.items():
                    assert logprob == pytest.approx(float(distribution[int(token.removeprefix("token_id:"))]), abs=1e-3)
