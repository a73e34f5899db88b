"""Loading of the frozen base model and its tokenizer; the base is quantised or sharded where the config says so."""

import re
from collections.abc import Iterable, Mapping, Sequence
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

from converter.adapter_dir import BaseNotFound
from converter.adapter_dir.base import stored_shapes, without_stray_files
from converter.adapter_dir.base_names import language_model_class, parameters_from, without_messages
from converter.errors import first_line
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.failures import is_out_of_memory
from trainer.targets import head_modules, is_inside

_MODELS = {"masked_lm": AutoModelForMaskedLM, "classification": AutoModelForSequenceClassification}
_LANGUAGE_HEADS = {"ForCausalLM": "causal_lm", "LMHeadModel": "causal_lm", "ForMaskedLM": "masked_lm"}


def load_tokenizer(folder: Path, config: TrainConfig) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer, with a padding token and the chat template of the run.

    Raises BaseNotFound, and ConfigError for a template that cannot be read.
    """
    try:
        with without_messages():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # `tokenizers` raises a plain Exception for a damaged file
        raise BaseNotFound(f"the tokenizer in {folder} cannot be loaded: {_reason(error)}") from error
    if config.is_language_model and tokenizer.eos_token_id is None:
        raise BaseNotFound(f"the tokenizer in {folder} has no end-of-sequence token: set eos_token in its config")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BaseNotFound(f"the tokenizer in {folder} has no padding token: set pad_token in its config")
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template {config.chat_template} cannot be read: {first_line(error)}") from error
    return tokenizer


def stop_tokens(folder: Path, config: TrainConfig) -> frozenset[int]:
    """Return the ids at which a server ends an answer, as the base's generation config and `config` list them."""
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):  # most often there is no such file
        found = None
    return frozenset([found] if isinstance(found, int) else found or ()) | config.stop_tokens


def load_base(
    folder: Path, config: TrainConfig, labels: Sequence[str] = (), *, head_type: str | None = None
) -> PreTrainedModel:
    """Return the base, frozen, in eval mode, on this process's device.

    `head_type` is "causal_lm", "masked_lm" or "classification"; by default `config.task`. A classifier gets a new head
    for `labels`. Raises BaseNotFound.
    """
    state = PartialState()
    # Full fine-tuning updates these weights: small steps need more than bfloat16's eight bits.
    dtype = "float32" if config.method == "full" and config.dtype == "auto" else config.dtype
    try:
        with without_messages(), without_stray_files(folder) as own_files:
            model, loaded = _model_class(own_files, config, head_type or config.task).from_pretrained(
                own_files,
                dtype=dtype,
                quantization_config=_quantization(config),
                trust_remote_code=config.trust_remote_code,
                ignore_mismatched_sizes=True,  # checked below
                output_loading_info=True,
                **_label_settings(labels),
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise BaseNotFound(f"base model in {folder} cannot be loaded: {_reason(error)}") from error
    model.name_or_path = str(folder)
    shapes = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in loaded["mismatched_keys"]}
    _refuse_random_weights(folder, model, loaded["missing_keys"], shapes)
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
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    architectures = settings.architectures or []
    head_types = [head for end, head in _LANGUAGE_HEADS.items() if any(name.endswith(end) for name in architectures)]
    if not head_types:
        return None
    model = load_base(folder, config, head_type=head_types[0])
    if backbone is not None:
        setattr(model, model.base_model_prefix, backbone)
    return model


def base_without_weights(folder: Path, config: TrainConfig, labels: Sequence[str] = ()) -> PreTrainedModel:
    """Return the base's modules on the meta device: names and shapes without data.

    Raises BaseNotFound, also if a tensor is missing on disk or has another shape there.
    """
    code = config.trust_remote_code
    try:
        with without_messages(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=code, **_label_settings(labels))
            kind = _model_class(folder, config, config.task)
            model: PreTrainedModel = kind.from_config(settings, trust_remote_code=code)
    except (OSError, ValueError, ImportError) as error:
        raise BaseNotFound(f"the config of the base model in {folder} cannot be used: {_reason(error)}") from error
    if getattr(settings, "quantization_config", None) is None:  # else the tensors on disk are packed
        _check_stored(folder, model)
    return model


def _model_class(folder: Path, config: TrainConfig, head_type: str) -> Any:
    """Return the automatic class of transformers that loads the base with the head `head_type`. Raises OSError."""
    if head_type in _MODELS:
        return _MODELS[head_type]
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    return (
        language_model_class(settings) or AutoModelForCausalLM
    )  # which names the classes that it supports, or runs code


def _check_stored(folder: Path, model: PreTrainedModel) -> None:
    """Raise BaseNotFound unless the tensors on disk fill all parameters of `model`; reads only their headers."""
    stored = stored_shapes(folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled, shapes = set(), {}
    for tensor, found in parameters_from(model, stored).items():
        for name, is_stored in found:
            filled.add(name)
            if is_stored and name in parameters and tuple(parameters[name].shape) != stored[tensor]:
                shapes[name] = stored[tensor], tuple(parameters[name].shape)
    for one, other in model.all_tied_weights_keys.items():
        if filled & {one, other}:
            filled |= {one, other}
    optional = "|".join(model._keys_to_ignore_on_load_missing or ())
    missing = [name for name in parameters if name not in filled and not (optional and re.search(optional, name))]
    _refuse_random_weights(folder, model, missing, shapes)


def _refuse_random_weights(
    folder: Path,
    model: PreTrainedModel,
    missing: Iterable[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise BaseNotFound if a parameter outside a classifier's head is not on disk, or has another shape there.

    transformers would set it to random numbers. `shapes` are those on disk and in the model, where they differ.
    """
    heads = head_modules(model) if type(model).__name__.endswith("ForSequenceClassification") else []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in (name for name in shapes if not is_inside(name, heads)):
        stored, wanted = shapes[name]
        raise BaseNotFound(
            f"base model in {folder}: {name} is {stored} on disk, but config.json says {wanted}: correct config.json"
        )
    random = sorted(name for name in missing if name in parameters and not is_inside(name, heads))
    if random:
        others = f" and {len(random) - 1} others" if len(random) > 1 else ""
        raise BaseNotFound(f"base model in {folder} has no tensor for {random[0]}{others}: download the base again")


def _reason(error: Exception) -> str:
    """Return the reason of an error of transformers in one line."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own: read that code, then set trust_remote_code=true to run it"
    return first_line(error)


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
