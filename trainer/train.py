"""The way through: base and data in, a trained Astra adapter folder out."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from converter import adapter_dir
from converter.adapter_dir import AstraAdapter, BaseNotFound
from trainer.adapter import adapter_layers, attach, peft_config, target_layers
from trainer.calibration import gram_matrices, layer_groups
from trainer.config import TrainConfig
from trainer.data import Batch, batches, read_examples, shuffled_batches
from trainer.eigenspace import Spectrum, subspace
from trainer.errors import TrainerError
from trainer.report import plot_loss, provenance, write_card, write_loss


@dataclass(frozen=True)
class Point:
    """One step of the loss curve; the loss is in nats per target token."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


def train(base: str, data: Path, out: Path, config: TrainConfig, progress: Progress) -> list[Point]:
    """Train an adapter for `base` on `data`, write it to `out` and return its loss curve.

    Raises TrainerError, and AdapterError for the base and the output folder; then nothing is written.
    """
    adapter_dir.refuse_existing(out)
    folder = adapter_dir.find_base(base)
    torch.manual_seed(config.seed)
    model, tokenizer = load_base(folder, config)
    examples = read_examples(data, tokenizer, config.max_length)
    layers = target_layers(model, config)
    origin = provenance(base, folder, str(model.dtype), data, len(examples), config)

    with adapter_dir.new_folder(out) as unfinished:
        with progress:
            sample = random.Random(config.seed).sample(examples, min(config.calibration_rows, len(examples)))
            calibration = batches(sample, config.batch_size, tokenizer.pad_token_id)
            bases, spectra = find_subspaces(model, layers, calibration, config, progress)
            peft_model = attach(model, bases, config)

            order = torch.Generator().manual_seed(config.seed)
            stream = shuffled_batches(examples, config.batch_size, tokenizer.pad_token_id, order)
            curve = list(optimise(peft_model, stream, config, progress))

        origin["spectra"] = {name: spectrum.as_json() for name, spectrum in spectra.items()}
        settings = peft_config(config, base, bases).to_dict()
        adapter_dir.save_astra(unfinished, AstraAdapter(adapter_layers(peft_model), settings, origin))
        write_loss(unfinished, curve)
        plot_loss(unfinished, curve)
        write_card(unfinished, origin, curve)
    return curve


def load_base(folder: Path, config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the frozen base in eval mode, on the accelerator when there is one, and its tokenizer."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=config.dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseNotFound(f"base model in {folder} cannot be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise BaseNotFound(f"the tokenizer in {folder} has no end-of-sequence token: set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def find_subspaces(
    model: PreTrainedModel,
    layers: dict[str, nn.Linear],
    calibration: list[Batch],
    config: TrainConfig,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], dict[str, Spectrum]]:
    """Return Q (d_out, r) and the spectrum of every target layer, holding few Gram matrices at a time."""
    groups = list(layer_groups(layers, int(config.calibration_memory * 2**30)))
    forward = progress.add_task("calibration", total=len(groups) * len(calibration))
    decompose = progress.add_task("eigenvectors", total=len(layers))
    generator = torch.Generator().manual_seed(config.seed)
    bases, spectra = {}, {}
    for group in groups:
        grams = gram_matrices(model, group, calibration, on_batch=lambda: progress.advance(forward))
        for name in group:
            bases[name], spectra[name] = subspace(grams.pop(name), config.rank, config.subspace, generator)
            progress.advance(decompose)
    return bases, spectra


def optimise(model: nn.Module, stream: Iterator[Batch], config: TrainConfig, progress: Progress) -> Iterator[Point]:
    """Train for `config.steps` steps and yield each step's point. Raises TrainerError when the loss is not finite."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, config))
    device = parameters[0].device
    bar = progress.add_task("training", total=config.steps)
    for step in range(1, config.steps + 1):
        batch = next(stream).to(device)
        loss = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        point = Point(step, loss.item(), norm.item(), float(schedule.get_last_lr()[0]))
        if not math.isfinite(point.loss):
            raise TrainerError(f"the loss became {point.loss} at step {step}: lower learning_rate")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.update(bar, advance=1, description=f"training  loss {point.loss:.3f}")
        yield point
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise TrainerError(f"the adapter is not finite after step {config.steps}: lower learning_rate")


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Return the share of the peak learning rate at `step` (from 0): a linear rise, then a half cosine to 0.

    The first step has a rate above 0 already, so no step is wasted.
    """
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
