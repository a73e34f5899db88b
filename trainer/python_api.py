"""Astra from Python: an adapter with Astra's start for any training loop, and its folders.

    model = get_astra_model(base, LoraConfig(r=16, target_modules="all-linear"), data_loader)
    ...                                  # transformers' Trainer, TRL's trainers, or optimizer.step()
    save_lora(model, "lora")             # the standard LoRA, proved against the model

The model is a `PeftModel`. Whatever PEFT, transformers or TRL write, merge or publish from it is the standard LoRA of
what was trained, of rank 2r, or r where B is frozen (see `trainer.exact_start`).
"""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from converter import adapter_dir
from converter.adapter_dir import AstraAdapter, Json
from converter.convert import MAX_KL, Conversion, Options, convert
from trainer.adapter import (
    ADAPTER,
    Start,
    adapted_modules,
    adapter_layers,
    attach,
    restart,
    saved_config,
    target_layers,
    trained_head,
)
from trainer.config import Subspace, TrainConfig
from trainer.data import Batch, Example, batches, language_examples, preference_examples
from trainer.errors import ConfigError, DataError, TargetError
from trainer.exact_start import has_start
from trainer.report import provenance
from trainer.start.initialise import initialise
from trainer.targets import layer_shape

_USED = {"r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "task_type"}
_UNUSED = {"base_model_name_or_path", "peft_version", "revision", "inference_mode", "peft_type"}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_RECORDED = (
    *("method", "rank", "alpha", "use_rslora", "subspace", "train_b"),
    *("target_modules", "rank_pattern", "task", "seed"),
)


def get_astra_model(
    model: PreTrainedModel,
    peft_config: LoraConfig,
    data: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    subspace: Subspace = "tail",
    train_b: bool = True,
    calibration_rows: int = 128,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> PeftModel:
    """Return `model`, wrapped by PEFT in place, with an adapter that starts at Astra's A0 = Q^T W, B0 = Q.

    `peft_config` gives rank, alpha and targets: `target_modules` is a list of names, or "all-linear", which is also
    the default. Q is computed from the outputs of the layers on the first `calibration_rows` rows of `data`: a data
    loader (dicts of tensors with `input_ids`, and `attention_mask` where there is padding), a data set with lists of
    `input_ids`, or rows of text as `astra-train` and DPO take them, which need the `tokenizer`. With `train_b=False`, B
    stays at Q. Under accelerate, all processes pass the same rows.

    The output of the model is that of the base, bit for bit, until the first step. Raises TrainerError where settings,
    data or targets cannot be used.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("the model has an adapter already: pass the base")
    config = _settings(model, peft_config, subspace=subspace, train_b=train_b, seed=seed)
    rows = _calibration(data, tokenizer, calibration_rows, config)
    was_training = model.training
    _on_this_device(model).eval()
    layers = target_layers(model, config)
    with _progress(show=show_progress_bar) as progress:
        found = initialise(model, layers, rows, config, "", progress)
    return _started(model, found.starts, config).train(was_training)


def initialize_lora_astra_weights(
    model: PeftModel,
    data: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    subspace: Subspace = "tail",
    train_b: bool = True,
    calibration_rows: int = 128,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> None:
    """Give the LoRA of `model` Astra's start in place, as PEFT's `initialize_lora_eva_weights` does for EVA.

    For models that a trainer makes itself from a `peft_config`. It must be called before the first step, and before an
    optimizer is made: the parameters are others. The arguments are those of `get_astra_model`; the rank in
    `model.peft_config` becomes that of the standard LoRA, 2r. Raises TrainerError.
    """
    base, given = model.get_base_model(), model.peft_config[ADAPTER]
    config = _settings(base, given, subspace=subspace, train_b=train_b, seed=seed)
    adapted = adapted_modules(model)
    if any(layer.lora_B[ADAPTER].weight.any() for layer in adapted.values()):
        raise ConfigError("the adapter of the model has left its start already: call this before training")
    layers = {name: cast(nn.Linear, layer.get_base_layer()) for name, layer in adapted.items()}
    rows = _calibration(data, tokenizer, calibration_rows, config)
    was_training = model.training
    _on_this_device(model).eval()
    with _progress(show=show_progress_bar) as progress, model.disable_adapter(), _plain_attention(base):
        found = initialise(base, layers, rows, config, "", progress)
    restart(model, found.starts, config)
    model.train(was_training)


def save_adapter(model: PeftModel, out: str | os.PathLike[str]) -> None:
    """Write the Astra adapter of `model` to the new folder `out`: A, B, A0 and B0, from which training can go on.

    The base must be a folder or a model of the hub that is available locally: its digest is recorded. Raises
    AdapterError; after an error nothing is written.
    """
    folder = Path(out)
    adapter_dir.refuse_existing(folder)
    settings = _settings_of(model)
    base = model.get_base_model()
    name = os.path.abspath(base.name_or_path) if Path(base.name_or_path).is_dir() else base.name_or_path  # noqa: PTH100
    origin = provenance(name, _base(base), str(base.dtype), None, settings)
    origin["config"] = {key: origin["config"][key] for key in _RECORDED}
    with adapter_dir.new_folder(folder) as new:
        config = saved_config(model, name) | _labels(base, settings)
        adapter = AstraAdapter(adapter_layers(model), config, origin, trained_head(model))
        adapter_dir.save_astra(new, adapter)


def save_lora(
    model: PeftModel,
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    max_kl: float = MAX_KL,
    verify: bool = True,
    show_progress_bar: bool = False,
) -> Conversion:
    """Write the standard LoRA of `model` to the new folder `out`, for PEFT, vLLM and `astra-serve`.

    It is `save_adapter` and `astra-convert` in one call: what was written is read back and compared with the model,
    `max_kl` is the largest mean difference of a token's distribution (nats), and the folder holds the probe that a
    server proves it with. Raises AdapterError; after an error nothing is written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter"
        save_adapter(model, adapter)
        options = Options(base=str(_base(model.get_base_model())), dtype=dtype, max_kl=max_kl, verify=verify)
        return convert(adapter, Path(out), options, _progress(show=show_progress_bar))


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PeftModel:
    """Return `model`, wrapped by PEFT in place, with the Astra adapter in `folder`, to train it further.

    Raises AdapterError where the folder has no Astra adapter or one of another base, and TargetError where the model
    has no such layers.
    """
    place = Path(folder)
    adapter = adapter_dir.load_astra(place)
    adapter_dir.check_base(place, adapter.provenance["base"]["digest"], adapter_dir.base_digest(_base(model)))
    recorded = adapter.provenance["config"]
    settings = TrainConfig(**{key: recorded[key] for key in _RECORDED if key in recorded})
    modules = dict(model.named_modules())
    for name, layer in adapter.layers.items():
        shape = layer_shape(modules[name]) if isinstance(modules.get(name), nn.Linear | Conv1D) else None
        if shape != (len(layer.b), layer.a.shape[1]):
            raise TargetError(f"{folder}: the model has no linear layer {name} of this shape")
    started = _started(model, {name: Start(layer.a0, layer.b0) for name, layer in adapter.layers.items()}, settings)
    adapted = adapted_modules(started)
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            factor_a, factor_b = adapted[name].lora_A[ADAPTER], adapted[name].lora_B[ADAPTER]
            if has_start(adapted[name], ADAPTER):
                factor_a.move.copy_(layer.a - layer.a0)
                factor_b.move.copy_(layer.b - layer.b0)
            else:
                factor_a.weight.copy_(layer.a)
                factor_b.weight.copy_(layer.b)
        for name, tensor in trained_head(started).items():
            tensor.copy_(adapter.head[name])
    return started


def _on_this_device(model: nn.Module) -> nn.Module:
    """Return the model on this process's device, where the batches of the calibration are."""
    device = PartialState(cpu=not torch.cuda.is_available()).device
    return model if model.device.type == device.type else model.to(device)


def _started(model: PreTrainedModel, starts: Mapping[str, Start], settings: TrainConfig) -> PeftModel:
    """Return the model with its adapter and with our settings, which `save_adapter` records."""
    started = attach(model, starts, settings)
    started.astra_settings = settings
    return started


def _settings_of(model: PeftModel) -> TrainConfig:
    """Return the settings of a model that this module made. Raises ConfigError for others."""
    found = getattr(model, "astra_settings", None)
    if not isinstance(found, TrainConfig):
        raise ConfigError("the model was not made by get_astra_model or load_adapter: use PEFT's save_pretrained")
    return found


def _settings(model: PreTrainedModel, given: LoraConfig, **ours: Any) -> TrainConfig:
    """Return our settings for PEFT's config. Raises ConfigError for those that an Astra adapter cannot have."""
    defaults = LoraConfig()
    for field in dataclasses.fields(given):
        if field.name not in _USED | _UNUSED and getattr(given, field.name) != getattr(defaults, field.name):
            raise ConfigError(f"LoraConfig: an Astra adapter has no {field.name}: leave it at its default")
    targets = given.target_modules or "all-linear"
    if isinstance(targets, str) and targets != "all-linear":
        raise ConfigError("LoraConfig: target_modules must be a list of names, or all-linear")
    names: list[str] | Literal["all-linear"] = "all-linear" if isinstance(targets, str) else sorted(targets)
    is_classifier = given.task_type == "SEQ_CLS" or "ForSequenceClassification" in type(model).__name__
    try:
        return TrainConfig(
            rank=given.r,
            alpha=given.lora_alpha,
            use_rslora=given.use_rslora,
            target_modules=names,
            rank_pattern={rf"^(.*\.)?({name})$": rank for name, rank in (given.rank_pattern or {}).items()},
            task="classification" if is_classifier else "causal_lm",
            spectra=False,
            **ours,
        )
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def _calibration(
    data: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None, n_rows: int, settings: TrainConfig
) -> list[Batch]:
    """Return the batches of the first rows of `data`. Raises DataError."""
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise DataError("data is empty: the calibration needs rows")
    rows = itertools.chain([first], iterator)
    if isinstance(first, Mapping) and isinstance(first.get("input_ids"), torch.Tensor) and first["input_ids"].ndim == 2:
        found: list[Batch] = []
        for batch in rows:
            found.append(_batch(batch))
            if sum(len(batch["input_ids"]) for batch in found) >= n_rows:
                break
        return found
    sample = list(itertools.islice(rows, n_rows))
    if isinstance(first, Mapping) and "input_ids" in first:
        return [_batch({key: torch.as_tensor(row[key])[None] for key in _INPUTS if key in row}) for row in sample]
    if tokenizer is None:
        raise DataError("rows of text need the tokenizer; or pass a data loader")
    return batches(_examples(sample, tokenizer, settings), settings.batch_size, tokenizer)


def _batch(batch: Mapping[str, torch.Tensor]) -> Batch:
    """Return what the calibration reads of a batch: without a mask, all tokens are real."""
    found = {key: batch[key] for key in _INPUTS if key in batch}
    return {"attention_mask": torch.ones_like(batch["input_ids"]), **found}


def _examples(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, settings: TrainConfig) -> Sequence[Example]:
    """Return the tokens of rows of text: those of `astra-train`, and a preference's prompt with its chosen answer."""
    named = [{"text": row} if isinstance(row, str) else dict(row) for row in rows]
    if settings.task == "classification":
        texts = [(row["text"], row.get("text_pair")) for row in named]
        return [{**tokenizer(*text, truncation=True, max_length=settings.max_length), "labels": 0} for text in texts]
    make = preference_examples if "chosen" in named[0] else language_examples
    return make(named, tokenizer, settings.max_length, "data")


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let attention take a padded batch: TRL's AsyncGRPOTrainer has an implementation for its own packed rows only."""
    before = model.config._attn_implementation
    if before not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _base(model: PreTrainedModel) -> Path:
    """Return the folder of the model's base. Raises BaseNotFound."""
    if not model.name_or_path:
        raise adapter_dir.BaseNotFound("the base has no folder: load it with from_pretrained")
    return adapter_dir.find_base(model.name_or_path, download=False)


def _labels(base: PreTrainedModel, settings: TrainConfig) -> Json:
    names = base.config.id2label or {}
    return {"id2label": {str(i): name for i, name in names.items()}} if settings.task == "classification" else {}


def _progress(*, show: bool) -> Progress:
    is_main: bool = PartialState(cpu=not torch.cuda.is_available()).is_main_process
    return Progress(console=Console(stderr=True), disable=not (show and is_main))
