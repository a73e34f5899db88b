"""Run one trial with the trainer's own parts, test rows, and a choice of the calibration text."""

import math
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, logging

from benchmarks import report
from benchmarks.methods import bases, starts, tasks
from benchmarks.methods.trial import Outcome, Trial, config_of
from trainer.adapter import attach, target_layers, whole_weight
from trainer.base import language_model, load_base, load_tokenizer
from trainer.config import TrainConfig
from trainer.data import Batch, Example, Row, batches, classification_examples, digest, language_examples
from trainer.errors import TrainingError
from trainer.evaluate import answers_match, forgetting_batches, language_loss
from trainer.loop import optimise
from trainer.start.eigenspace import effective_rank
from trainer.start.initialise import calibration_batches, initialise, spectra_of
from trainer.train import spectra_after

ROWS: dict[tasks.Split, int] = {"train": 2000, "validation": 128, "test": 256}
ROWS_SMOLLM2: dict[tasks.Split, int] = {"train": 2000, "validation": 64, "test": 128}  # 30 times as large
# The task whose text is used for the calibration "other".
OTHER_TEXT = {"math": "cpp", "cpp": "math", "intent": "math", "python": "cpp"}


def prepare(threads: int) -> None:
    """Prepare a process for trials: number of threads, device, and the commit of the code that it has imported."""
    torch.set_num_threads(threads)
    PartialState(cpu=not torch.cuda.is_available())
    logging.set_verbosity_error()  # it would report the new head of each classifier
    _environment()


def execute(trial: Trial) -> tuple[Outcome, dict[str, Any]]:
    """Run a trial, and return its outcome and its environment (see `report.environment`)."""
    began = time.monotonic()
    config = config_of(trial, starts.settings_of(trial.method))
    folder = bases.folder(trial.base)
    tokenizer = load_tokenizer(folder, config)
    sizes = ROWS_SMOLLM2 if trial.base == "smollm2" else ROWS
    rows = {split: examples(trial.task, split, n, tokenizer, config) for split, n in sizes.items()}
    env = {**_environment(), "seed": trial.seed, "rows": digest([row for found in rows.values() for row in found])}
    labels = tasks.CLASSES.get(trial.task, [])
    torch.manual_seed(trial.seed)
    model = load_base(folder, config, labels)
    if trial.base == "smollm2":  # with rows of 60 tokens a CPU's fused attention makes a step 1.4 times as long
        model.set_attn_implementation("eager")
    model.config.pad_token_id = tokenizer.pad_token_id
    own_text = bases.own_text(trial.base)
    forgetting = _Forgetting(folder, own_text, tokenizer, config) if own_text else None
    layers = target_layers(model, config)
    text = {"own": trial.task, "other": OTHER_TEXT.get(trial.task, ""), "random": "random"}[trial.calibration]
    calibration = calibration_batches(examples(text, "train", sizes["train"], tokenizer, config), tokenizer, config)
    before = _effective_ranks(model, layers, calibration, config) if trial.spectra else {}

    trained = adapted(model, layers, calibration, tokenizer, config, trial.method)
    with tempfile.TemporaryDirectory() as checkpoints:
        hidden = Progress(disable=True)
        try:
            result = optimise(
                trained,
                tokenizer,
                rows["train"],
                [],
                config,
                trial.learning_rate,
                Path(checkpoints) / "c",
                None,
                hidden,
            )
        except TrainingError as error:
            return Outcome(error=str(error), seconds=time.monotonic() - began), env
    trained.eval()
    after = _effective_ranks(trained, layers, calibration, config) if trial.spectra else {}
    outcome = Outcome(
        validation=_loss(trained, rows["validation"], tokenizer, config),
        test=_loss(trained, rows["test"], tokenizer, config),
        metric=None if trial.task in ("cpp", "python") else _metric(trained, rows["test"], tokenizer, config),
        forgetting=forgetting(trained) if forgetting else math.inf,
        curve=[point.loss for point in result.curve],
        gradients=[point.grad_norm for point in result.curve],
        effective_rank={name: (value, after[name]) for name, value in before.items()},
        parameters=sum(p.numel() for p in trained.parameters() if p.requires_grad),
        seconds=time.monotonic() - began,
    )
    return outcome, env


def adapted(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    calibration: list[Batch],
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    method: str,
) -> nn.Module:
    """Return the model to train: with the method's adapter, or with trainable target layers for full fine-tuning.

    All methods train the new head of a classifier.
    """
    if config.method == "full":
        model.requires_grad_(False)
        for name, module in model.named_children():
            module.requires_grad_(config.task == "classification" and name != model.base_model_prefix)
        for layer in layers.values():
            layer.requires_grad_(True)
        return model
    if method in starts.TRIED:
        return attach(model, starts.tried_starts(method, model, layers, calibration, tokenizer, config), config)
    return attach(model, initialise(model, layers, calibration, config, "", Progress(disable=True)).starts, config)


def examples(
    task: str, split: tasks.Split, n: int, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> list[Example]:
    """Return `n` rows of a task's split as tokens."""
    rows = _rows(task, split, n)
    if config.task == "classification":
        return classification_examples(rows, tokenizer, config.max_length, task, tasks.CLASSES[task])
    return language_examples(rows, tokenizer, config.max_length, task)


@cache
def _rows(task: str, split: tasks.Split, n: int) -> list[Row]:
    return tasks.rows(task, split, n)


@torch.no_grad()
def _loss(model: nn.Module, rows: list[Example], tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> float:
    made = batches(rows, 32, tokenizer)
    if config.task == "causal_lm":
        return language_loss(model, made)
    total = sum(float(model(**batch).loss) * len(batch["labels"]) for batch in _on_device(made))
    return total / len(rows)


@torch.no_grad()
def _metric(model: nn.Module, rows: list[Example], tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> float:
    """Return the share of rows with exactly the right answer, or the right class."""
    hits = [
        answers_match(model, batch)
        if config.task == "causal_lm"
        else model(**batch).logits.argmax(-1) == batch["labels"]
        for batch in _on_device(batches(rows, 32, tokenizer))
    ]
    return float(torch.cat(hits).float().mean())


def _on_device(made: list[Batch]) -> list[Batch]:
    device = PartialState().device
    return [{key: value.to(device) for key, value in batch.items()} for batch in made]


class _Forgetting:
    """The increase of the loss on the base's own text; the loss before training is measured at creation."""

    def __init__(self, folder: Path, text: Path, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
        self._folder, self._config = folder, config
        own = config.model_copy(update={"forgetting_data": str(text)})
        untouched = language_model(folder, config)
        assert untouched is not None
        self._text = forgetting_batches(untouched, tokenizer, own)
        self._before = language_loss(untouched, self._text)

    def __call__(self, trained: nn.Module) -> float:
        """Return the loss after training minus the loss before."""
        model: nn.Module | None = trained
        if self._config.task == "classification":
            whole = trained.get_base_model() if isinstance(trained, PeftModel) else trained
            model = language_model(self._folder, self._config, whole.base_model)
        assert model is not None
        return language_loss(model, self._text) - self._before


def _effective_ranks(
    model: nn.Module, layers: dict[str, nn.Linear], calibration: list[Batch], config: TrainConfig
) -> dict[str, float]:
    """Return the effective rank of the outputs of every target layer on the calibration rows."""
    hidden = Progress(disable=True)
    if isinstance(model, PeftModel):
        values = spectra_after(model, calibration, config, hidden)
    else:
        weights = {name: whole_weight(layer).float() for name, layer in layers.items()}
        values = spectra_of(model, layers, weights.__getitem__, calibration, config, hidden)
    return {name: effective_rank(found.double()) for name, found in values.items()}


@cache
def _environment() -> dict[str, Any]:
    """Return the environment of this process; cached, because the commit is that of the code which it has imported."""
    return report.environment(0, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
