"""A compiled engine that starts again loads what it compiled, and computes with the weights that are on disk now."""

import shutil
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import demo
from tests.support.server import astra_serve

LOADED = "Directly load AOT compilation"
PROMPT = "def f(x): return"


def served(base: Path, log: Path) -> list[float]:
    """Return the log probability of each token of the prompt but the first, of a compiled engine."""
    cache = {"VLLM_CACHE_ROOT": str(base.parent / "cache")}
    with astra_serve(["--base", str(base), "--max-model-len", "128"], log, environment=cache) as server:
        body = {"prompt": PROMPT, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": base.name, **body}, timeout=60).json()
    return answer["choices"][0]["logprobs"]["token_logprobs"][1:-1]


@torch.no_grad()
def computed(base: Path) -> list[float]:
    """Return the same numbers of transformers."""
    ids = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")["input_ids"]
    logits = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    return logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()


@pytest.mark.timeout(600)
def test_a_cached_model_has_the_weights_of_its_folder(tmp_path: Path) -> None:
    base = Path(shutil.copytree(demo.BASE, tmp_path / "base"))
    first = served(base, tmp_path / "first.log")
    weights = load_file(base / "model.safetensors")
    changed = {name: 0.5 * weight if "proj" in name else weight for name, weight in weights.items()}
    save_file(changed, base / "model.safetensors", {"format": "pt"})
    second = served(base, tmp_path / "second.log")
    assert LOADED not in (tmp_path / "first.log").read_text()
    assert LOADED in (tmp_path / "second.log").read_text()
    assert second == pytest.approx(computed(base), abs=0.1)
    assert second != pytest.approx(first, abs=0.3)
