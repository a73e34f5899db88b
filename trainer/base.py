"""Loading of the frozen base model and its tokenizer; the base is quantised or sharded where the config says so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from converter.adapter_dir import BaseNotFound
from converter.errors import first_line
from trainer.config import TrainConfig

_MODELS = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
}
_LANGUAGE_HEADS = {"ForCausalLM": "causal_lm", "ForMaskedLM": "masked_lm"}


def load_tokenizer(folder: Path, config: TrainConfig) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer, with a padding token. Raises BaseNotFound."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    if config.task == "causal_lm" and tokenizer.eos_token_id is None:
        raise BaseNotFound(f"the tokenizer in {folder} has no end-of-sequence token: set eos_token in its config")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BaseNotFound(f"the tokenizer in {folder} has no padding token: set pad_token in its config")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_tokens(folder: Path) -> frozenset[int]:
    """Return the ids at which a server ends an answer of this base, as its generation config lists them."""
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):  # most often there is no such file
        found = None
    return frozenset([found] if isinstance(found, int) else found or ())


def load_base(
    folder: Path, config: TrainConfig, labels: Sequence[str] = (), *, head_type: str | None = None
) -> PreTrainedModel:
    """Return the base, frozen, in eval mode, on this process's device.

    `head_type` is "causal_lm", "masked_lm" or "classification"; by default `config.task`. A classifier gets a new head
    for `labels`. Raises BaseNotFound.
    """
    logging.disable_progress_bar()
    state = PartialState()
    # Full fine-tuning updates these weights: small steps need more than bfloat16's eight bits.
    dtype = "float32" if config.method == "full" and config.dtype == "auto" else config.dtype
    try:
        model = _MODELS[head_type or config.task].from_pretrained(
            folder, dtype=dtype, quantization_config=_quantization(config), **_label_settings(labels)
        )
    except (OSError, ValueError, SafetensorError, ImportError) as error:
        raise BaseNotFound(f"base model in {folder} cannot be loaded: {first_line(error)}") from error
    model.config.use_cache = False
    model.requires_grad_(False).eval()
    if config.quantization == "none":
        model.to(state.device)
    if config.shard_base and state.num_processes > 1:
        _shard(model)
    return model


def language_model(
    folder: Path, config: TrainConfig, backbone: PreTrainedModel | None = None
) -> PreTrainedModel | None:
    """Return the causal or masked language model in `folder`; None if the base was saved without a language head.

    With `backbone`, the trained backbone of a classifier, the model has that backbone instead of its own: its loss then
    measures what the classifier forgot.
    """
    architectures = AutoConfig.from_pretrained(folder).architectures or []
    head_types = [head for end, head in _LANGUAGE_HEADS.items() if any(name.endswith(end) for name in architectures)]
    if not head_types:
        return None
    model = load_base(folder, config, head_type=head_types[0])
    if backbone is not None:
        setattr(model, model.base_model_prefix, backbone)
    return model


def base_without_weights(folder: Path, config: TrainConfig, labels: Sequence[str] = ()) -> PreTrainedModel:
    """Return the base's modules on the meta device: names and shapes without data. Raises BaseNotFound."""
    try:
        settings = AutoConfig.from_pretrained(folder, **_label_settings(labels))
        with torch.device("meta"):
            model: PreTrainedModel = _MODELS[config.task].from_config(settings)
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"the config of the base model in {folder} cannot be used: {first_line(error)}") from error
    return model


def _shard(model: PreTrainedModel) -> None:
    """Shard each block and then the rest over the processes (FSDP2): a block is gathered only while it computes."""
    state = PartialState()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    # By default the root stays gathered after a forward pass until a state dict is taken. Only the main process takes
    # one, for a checkpoint: the processes would then disagree.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _quantization(config: TrainConfig) -> BitsAndBytesConfig | None:
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return None


def _label_settings(labels: Sequence[str]) -> dict[str, Any]:
    if not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {n: i for i, n in enumerate(labels)},
    }
