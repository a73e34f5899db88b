"""The optimisation: TRL's SFTTrainer and DPOTrainer for language models, transformers' Trainer for classifiers.

The trainers get tokenised rows and a PEFT model with its adapter. They do checkpoints, packing, trackers, evaluation
and data parallelism.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import torch
from accelerate import PartialState
from rich.progress import Progress
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations

from trainer import router_loss
from trainer.config import TrainConfig
from trainer.data import Example, as_trl
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.sft import SELECTION, ExactMatchTrainer, SFTConfig, SFTTrainer
from trainer.unfinished import mark_complete

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


@dataclass(frozen=True)
class Point:
    """One step of the loss curve; the loss is in nats per target token, or per row or pair."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """The records of a finished optimisation; `best_step` is None without held-out rows."""

    curve: list[Point]
    evaluations: list[dict[str, float]]  # step, eval_loss and the metric, in step order
    best_step: int | None
    learning_rate: float  # its peak


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError when a tracker of `report_to` is unknown or not installed."""
    available = get_available_reporting_integrations()
    for name in config.report_to:
        if name not in available:
            installed = ", ".join(sorted(available)) or "none"
            raise ConfigError(f"report_to: {name!r} is unknown or not installed; installed: {installed}")


def optimise(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    learning_rate: float,
    folder: Path,
    checkpoint: Path | None,
    progress: Progress,
) -> Result:
    """Train `model` in place, from `checkpoint` if there is one; write checkpoints to `folder`.

    `learning_rate` is the peak of the schedule, which `config` may leave open (auto).

    With held-out rows the model ends with the weights of the best checkpoint. Raises TrainingError when the loss or a
    parameter is not finite, and Interrupted after SIGINT, once the current step is saved.
    """
    callback = _RunCallback(config, progress)
    with _tensorboard_folder(folder.parent / "runs" / folder.stem):
        trainer = _trainer(model, tokenizer, train, held_out, config, learning_rate, folder, callback)
    if config.quantization != "none":  # TRL has cast the adapter to bfloat16, which loses small steps
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)  # the progress bar shows the loss
    previous_handler = signal.signal(signal.SIGINT, callback.on_sigint)
    try:
        with router_loss.number_of_experts(model):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if callback.interrupted:
        raise Interrupted(f"interrupted; step {trainer.state.global_step} is saved in {folder}: continue with --resume")
    if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
        raise TrainingError(f"a trained parameter is not finite after step {config.steps}: lower learning_rate")
    history = trainer.state.log_history
    return Result(
        [Point(h["step"], h["loss"], h["grad_norm"], h["learning_rate"]) for h in history if "loss" in h],
        [
            {key: h[key] for key in ("step", "eval_loss", "eval_exact_match", "eval_accuracy") if key in h}
            for h in history
            if "eval_loss" in h
        ],
        trainer.state.best_global_step if held_out else None,
        learning_rate,
    )


@contextmanager
def _tensorboard_folder(folder: Path) -> Iterator[None]:
    """Let TensorBoard write to `folder` unless the user has set its environment variable."""
    set_by_user = _TENSORBOARD in os.environ
    os.environ.setdefault(_TENSORBOARD, str(folder))
    try:
        yield
    finally:
        if not set_by_user:
            del os.environ[_TENSORBOARD]


class _ClassifierTrainer(Trainer):
    """Trainer for a loss that is a mean over the rows of a micro-batch, and not over the rows of a step.

    transformers assumes the latter of each model that takes further keywords, and then neither divides the loss by the
    number of micro-batches, nor leaves its mean over the processes alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class _RunCallback(TrainerCallback):
    """Shows progress, stops at a loss that is not finite or at SIGINT, and marks checkpoints as complete."""

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._progress, self._bar = progress, progress.add_task("training", total=config.steps)
        self.interrupted = False

    def on_sigint(self, _signal: int, _frame: FrameType | None) -> None:
        """Request a checkpoint and a stop after this step; a second SIGINT raises KeyboardInterrupt at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_log(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Show the loss of the step; raise TrainingError if it is not finite."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise TrainingError(f"the loss became {logs['loss']} at step {state.global_step}: lower learning_rate")
            self._progress.update(
                self._bar, completed=state.global_step, description=f"training  loss {logs['loss']:.3f}"
            )

    def on_step_end(self, _args: TrainingArguments, _state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop all processes at the same step if one of them was interrupted."""
        if PartialState().num_processes > 1:
            interrupted = torch.tensor(int(self.interrupted), device=PartialState().device)
            distributed.all_reduce(interrupted)
            self.interrupted = bool(interrupted)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint, which is now fully written, as complete."""
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    learning_rate: float,
    folder: Path,
    callback: _RunCallback,
) -> Trainer:
    datasets.disable_progress_bars()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, config))
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        _average_gradients(model, parameters)
    common: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": _dataset(train, config),
        "eval_dataset": _dataset(held_out, config) if held_out else None,
        "optimizers": (optimizer, schedule),
        "callbacks": [callback, *([EarlyStoppingCallback(config.patience)] if config.patience else [])],
    }
    if config.task == "classification":
        return _ClassifierTrainer(
            args=TrainingArguments(
                **_arguments(config, folder, evaluated=bool(held_out)),
                label_names=["labels"],  # not every model names it in its signature, from which it would be taken
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
            **common,
        )
    if config.task == "dpo":
        from trainer.dpo import DPOConfig, PreferenceTrainer

        preferences = DPOConfig(
            **_arguments(config, folder, evaluated=bool(held_out)),
            beta=config.dpo_beta,
            max_length=None,
            **router_loss.settings(model),
        )
        return PreferenceTrainer(args=preferences, **common)
    arguments = SFTConfig(
        **_arguments(config, folder, evaluated=bool(held_out)),
        max_length=config.max_length,
        packing=config.packing,
        eval_packing=False,
        dataset_kwargs=None if config.packing else {"skip_prepare_dataset": True},
        **router_loss.settings(model),
    )
    kind: Callable[..., Trainer] = ExactMatchTrainer if config.eval_metric == "exact_match" else SFTTrainer
    return kind(args=arguments, **common)


def _dataset(rows: Sequence[Example], config: TrainConfig) -> datasets.Dataset:
    return datasets.Dataset.from_list([as_trl(row) for row in rows] if config.task == "dpo" else list(rows))


def _average_gradients(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Average the adapter's gradients over the processes when FSDP2 shards the base.

    FSDP2 handles the frozen base only; each process holds the whole adapter. Accelerate's DDP does not accept DTensors.
    """

    def average(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        distributed.all_reduce(parameter.grad)
        parameter.grad /= PartialState().num_processes

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(average)
    setattr(model, "_is_accelerate_prepared", True)  # noqa: B010  so that accelerate does not wrap it


def _arguments(config: TrainConfig, folder: Path, *, evaluated: bool) -> dict[str, Any]:
    processes = PartialState().num_processes
    eval_steps = config.eval_steps or max(1, config.steps // 10)
    micro_batch = config.batch_size // config.gradient_accumulation // processes
    evaluation = {
        "eval_strategy": "steps",
        "eval_steps": eval_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{SELECTION if config.eval_metric == 'exact_match' else config.eval_metric}",
        "greater_is_better": config.eval_metric != "loss",
    }
    return {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_checkpointing": config.gradient_checkpointing,
        "max_grad_norm": config.max_grad_norm,
        "save_steps": eval_steps if evaluated else config.save_steps,  # the best checkpoint must be on disk
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": config.report_to or "none",
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": False,  # the base has its own dtype, the adapter is float32
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        **(evaluation if evaluated else {}),
    }


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Return the share of the peak learning rate at `step` (from 0): a linear rise, then a half cosine to 0.

    The rate of the first step is above 0, so that every step trains.
    """
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
