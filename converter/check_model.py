"""Does the base with the written LoRA say what the trained model says? And what it says: the probe.

Both are computed in the dtype that will be served: the base with the exact change (float32), with the stored LoRA, and
by itself, on a few prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from converter.adapter_dir import AdapterError, BaseNotFound, Json, LoraAdapter, WrongBase
from converter.check_factors import NotTheAdapter
from converter.errors import first_line
from converter.sources import Factors, Source

LONGEST = 512  # tokens of a prompt
TOP = 5  # tokens of a probe's distribution

# What a probe asks when nobody said what the adapter is for: prose, code, a question, an instruction, a list.
PROMPTS = (
    "The history of the city begins",
    "def read_lines(path: str) -> list[str]:\n",
    "Question: Which of the two is larger?\nAnswer:",
    "Summarize the following text in one sentence:\n",
    "1. apples\n2. pears\n3.",
    '{"name": "',
    "Dear customer,\n\nthank you for",
    "import numpy as np\n\nx =",
)


@dataclass(frozen=True)
class Agreement:
    """What stands between the trained model and the served one over all tokens of the prompts."""

    max_logit_difference: float
    mean_kl: float  # KL(trained || served), nats a token
    greedy_agreement: float  # share of tokens after which both are likeliest to say the same
    effect: float  # KL(trained || base): what the adapter itself does to these prompts
    positions: int


def why_not(source: Source, base: Path | None) -> str | None:
    """Return why the adapter cannot be compared in the model itself; None where it can."""
    if base is None:
        return "the base is not at hand: give --base"
    if source.head:
        return "a classifier's labels have no probe"
    try:
        architectures = AutoConfig.from_pretrained(base, trust_remote_code=False).architectures or ()
    except (OSError, ValueError, KeyError) as error:
        raise BaseNotFound(f"base model in {base} cannot be understood: {first_line(error)}") from error
    if not any(name.endswith("ForCausalLM") for name in architectures):
        return "the base is no causal language model"
    return None


def check_model(
    source: Source, stored: LoraAdapter, base: Path, dtype: torch.dtype, prompts: Sequence[str], most_kl: float
) -> tuple[Agreement, Json]:
    """Return how well the served model agrees with the trained one, and the probe: what both say after each prompt.

    Raises BaseNotFound, WrongBase, and NotTheAdapter when the mean KL is above `most_kl`.
    """
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise BaseNotFound(f"base model in {base} cannot be loaded: {first_line(error)}") from error
    rows, ids, real = tokenised(tokenizer, prompts)
    plain = logits(model, ids, real, {}, stored.scaling)
    trained = logits(model, ids, real, source.factors, lambda *_: 1.0)
    served = logits(model, ids, real, stored.layers, stored.scaling)
    p, q, r = (values[real].double().log_softmax(-1) for values in (trained, served, plain))
    agreement = Agreement(
        max_logit_difference=float((trained[real] - served[real]).abs().max()),
        mean_kl=mean_kl(p, q),
        greedy_agreement=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        effect=mean_kl(p, r),
        positions=len(p),
    )
    if not agreement.mean_kl <= most_kl:
        raise NotTheAdapter(
            f"the served model would differ from the trained one by {agreement.mean_kl:.2g} nats a token (KL), allowed "
            f"are {most_kl:g}; the adapter itself changes {agreement.effect:.2g}: keep a larger rank, or raise --max-kl"
        )
    last = real.sum(1) - 1
    told = [
        {"prompt": prompt, "token_ids": row, "base": _top(plain[i, last[i]]), "adapter": _top(served[i, last[i]])}
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    return agreement, {"dtype": str(dtype).removeprefix("torch."), "prompts": told}


def tokenised(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Return the prompts' tokens, the same padded on the right (prompts, length), and which of these are real.

    Raises AdapterError for a prompt without tokens.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not all(rows):
        raise AdapterError("a prompt has no tokens: give --prompts a file with one prompt a line")
    longest = max(map(len, rows))
    if longest > LONGEST:
        raise AdapterError(f"a prompt has {longest} tokens: give prompts of up to {LONGEST}")
    ids = torch.tensor([row + (longest - len(row)) * [0] for row in rows])
    return rows, ids, torch.tensor([[i < len(row) for i in range(longest)] for row in rows])


@torch.no_grad()
def logits(
    model: nn.Module,
    ids: torch.Tensor,
    real: torch.Tensor,
    layers: Mapping[str, Factors],
    scaling: Callable[[str, int], float],
) -> torch.Tensor:
    """Return the logits (prompts, length, vocabulary), float32, of `model` with the changes `layers`.

    Each change is computed in its factors' dtype and added to its layer's output; a layer is read once.
    Raises WrongBase.
    """
    with ExitStack() as undo:
        for module in layers:
            layer = _layer(model, module)
            undo.callback(layer.register_forward_hook(partial(_add, layers, module, scaling)).remove)
        found: torch.Tensor = model(input_ids=ids, attention_mask=real.long()).logits.float()
    return found


def mean_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the mean over rows of KL(p || q) from log probabilities; 0 where round-off makes it negative."""
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def _add(
    layers: Mapping[str, Factors],
    module: str,
    scaling: Callable[[str, int], float],
    _layer: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """A forward hook: the layer's output with the change of `layers`, computed in their dtype."""
    lora_a, lora_b = layers[module]
    change = inputs[0].to(lora_a.dtype) @ lora_a.T @ lora_b.T
    return (output + scaling(module, len(lora_a)) * change).to(output.dtype)


def _layer(model: nn.Module, module: str) -> nn.Module:
    try:
        return model.get_submodule(module)
    except AttributeError as error:
        raise WrongBase(f"transformers loads this base without a layer {module!r}: convert with --no-verify") from error


def _top(logits: torch.Tensor) -> dict[str, list[Any]]:
    values, ids = logits.double().log_softmax(-1).topk(min(TOP, len(logits)))
    return {"token_ids": ids.tolist(), "logprobs": [round(value, 4) for value in values.tolist()]}
