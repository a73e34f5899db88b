"""Compare the model with the written LoRA and the trained model, and record the probe, on a few prompts.

Three models are computed in the dtype that will be served: the base with the exact delta W (float32) as the trained
model, the base with the stored LoRA as the served model, and the base alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from converter.adapter_dir import AdapterError, BaseNotFound, Json, LoraAdapter, WrongBase
from converter.adapter_dir.base import without_stray_files
from converter.adapter_dir.base_names import expert_parts, language_model_class, loadable_models
from converter.check_experts import adapted_experts
from converter.errors import first_line
from converter.source import Factors, Source

MAX_PROMPT_TOKENS = 512
# Ends of the names of causal language models: GPT-2's is GPT2LMHeadModel, a multimodal one is for "conditional
# generation" as encoder-decoders are.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
TOP_TOKENS = 5  # of each distribution in a probe

# Prompts for an adapter of unknown purpose: prose, code, a question, an instruction, a list, JSON, a letter.
DEFAULT_PROMPTS = (
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
    """Differences between the trained and the served model over all tokens of the prompts."""

    max_logit_difference: float
    mean_kl: float  # KL(trained || served), nats per token
    greedy_agreement: float  # share of positions at which both models have the same most likely next token
    effect: float  # KL(trained || base), nats per token: how much the adapter itself changes the model
    positions: int


def reason_not_comparable(source: Source, base: Path | None) -> str | None:
    """Return the reason why the models cannot be compared, or None if they can. Raises BaseNotFound."""
    if base is None:
        return "the base is not available locally: give --base"
    if source.head:
        return "the adapter is a classifier, which has no probe"
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            return "the base needs Python code of its own, which astra-convert does not run"
        raise BaseNotFound(f"the config of the base model in {base} cannot be read: {first_line(error)}") from error
    is_language_model = any(name.endswith(_LANGUAGE_MODELS) for name in config.architectures or ())
    if not is_language_model or language_model_class(config) is None:
        return "the base is not a causal language model"
    return None


class Comparison:
    """The base and the trained model on a few prompts, with which LoRAs are compared."""

    def __init__(self, source: Source, base: Path, dtype: torch.dtype, prompts: Sequence[str]) -> None:
        """Compute the base and the trained model in `dtype`.

        Raises BaseNotFound, WrongBase, and AdapterError for unusable prompts.
        """
        logging.disable_progress_bar()
        try:
            kind = _model_class(base, source.factors)
            with without_stray_files(base) as own_files:
                self._model = kind.from_pretrained(own_files, dtype=dtype, trust_remote_code=False).eval()
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            raise BaseNotFound(f"base model in {base} cannot be loaded: {first_line(error)}") from error
        self._dtype, self._prompts = dtype, prompts
        self._rows, self._ids, self._mask = tokenise(tokenizer, prompts)
        self._base = logits(self._model, self._ids, self._mask, {}, lambda *_: 1.0)
        self._trained = logits(self._model, self._ids, self._mask, source.factors, lambda *_: 1.0)

    def served(self, lora: LoraAdapter) -> torch.Tensor:
        """Return the logits (prompts, length, vocabulary) of the base with `lora`. Raises WrongBase."""
        return logits(self._model, self._ids, self._mask, lora.layers, lora.scaling)

    def agreement(self, served: torch.Tensor) -> Agreement:
        """Return how well the model with the logits `served` agrees with the trained model."""
        trained, served, plain = (values[self._mask].double() for values in (self._trained, served, self._base))
        difference = float((trained - served).abs().max())
        trained, served, plain = (values.log_softmax(-1) for values in (trained, served, plain))
        return Agreement(
            max_logit_difference=difference,
            mean_kl=mean_kl(trained, served),
            greedy_agreement=float((trained.argmax(-1) == served.argmax(-1)).double().mean()),
            effect=mean_kl(trained, plain),
            positions=len(trained),
        )

    def probe(self, served: torch.Tensor) -> Json:
        """Return, for each prompt, the TOP_TOKENS most likely next tokens of the base and of the served model."""
        last = self._mask.sum(1) - 1
        answers = [
            {
                "prompt": prompt,
                "token_ids": row,
                "base": _top_tokens(self._base[i, last[i]]),
                "adapter": _top_tokens(served[i, last[i]]),
            }
            for i, (prompt, row) in enumerate(zip(self._prompts, self._rows, strict=True))
        ]
        return {"dtype": str(self._dtype).removeprefix("torch."), "prompts": answers}


def tokenise(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Return the tokens of each prompt, all tokens padded on the right (prompts, length), and the mask of real tokens.

    Raises AdapterError for a prompt without tokens or with more than MAX_PROMPT_TOKENS.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not all(rows):
        raise AdapterError("a prompt has no tokens: give --prompts a file with one prompt per line")
    longest = max(map(len, rows))
    if longest > MAX_PROMPT_TOKENS:
        raise AdapterError(f"a prompt has {longest} tokens: give prompts of at most {MAX_PROMPT_TOKENS} tokens")
    ids = torch.tensor([row + (longest - len(row)) * [0] for row in rows])
    return rows, ids, torch.tensor([[i < len(row) for i in range(longest)] for row in rows])


@torch.no_grad()
def logits(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    layers: Mapping[str, Factors],
    scaling: Callable[[str, int], float],
) -> torch.Tensor:
    """Return the logits (prompts, length, vocabulary), float32, of `model` with the LoRA `layers`.

    `scaling` maps a module and its rank to the factor of lora_B lora_A. Each product is computed in the dtype of its
    factors and added to its layer's output; the factors of a layer are read once. Raises WrongBase.
    """
    places = expert_parts(model, layers)
    with ExitStack() as hooks:
        hooks.enter_context(adapted_experts(model, layers, places, scaling))
        for module in layers.keys() - places.keys():
            layer = _layer(model, module)
            hooks.callback(layer.register_forward_hook(partial(_add_delta, layers, module, scaling)).remove)
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask.long()).logits.float()
    return found


def mean_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the mean KL(p || q), in nats, over rows of log probabilities; 0 if rounding makes it negative."""
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))


def _add_delta(
    layers: Mapping[str, Factors],
    module: str,
    scaling: Callable[[str, int], float],
    _layer: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """Forward hook: add the LoRA of `module` to the layer's output, computed in the dtype of its factors."""
    lora_a, lora_b = layers[module]
    change = inputs[0].to(lora_a.dtype) @ lora_a.T @ lora_b.T
    return (output + scaling(module, len(lora_a)) * change).to(output.dtype)


def _model_class(base: Path, modules: Iterable[str]) -> Any:
    """Return the class of the base's models that has all these modules, else that of its language model."""
    for model in loadable_models(base):
        if model.get_output_embeddings() is not None and {*modules} <= {name for name, _ in model.named_modules()}:
            return type(model)
    return language_model_class(AutoConfig.from_pretrained(base, trust_remote_code=False))


def _layer(model: nn.Module, module: str) -> nn.Module:
    try:
        return model.get_submodule(module)
    except AttributeError as error:
        raise WrongBase(
            f"this base has no layer {module!r} when transformers loads it: convert with --no-verify"
        ) from error


def _top_tokens(logits: torch.Tensor) -> dict[str, list[Any]]:
    values, ids = logits.double().log_softmax(-1).topk(min(TOP_TOKENS, len(logits)))
    return {"token_ids": ids.tolist(), "logprobs": [round(value, 4) for value in values.tolist()]}
