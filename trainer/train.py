"""The main path: base and data in, adapter folder out.

    read rows -> load the base -> calibrate and initialise -> train -> measure forgetting and spectra -> write `out`

`out` appears in one step, when all of it is written. A run that stops after its initialisation can be continued with
`resume` (see `trainer.unfinished`).
"""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from peft import PeftModel
from rich.progress import Progress
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from converter import adapter_dir
from converter.adapter_dir import AstraAdapter, Json
from converter.errors import first_line
from trainer import report, unfinished
from trainer.adapter import (
    adapted_modules,
    adapter_layers,
    attach,
    saved_config,
    target_layers,
    trained_head,
    whole_weight,
)
from trainer.base import language_model, load_base, load_tokenizer, stop_tokens
from trainer.config import TrainConfig
from trainer.data import (
    Batch,
    Example,
    Examples,
    classification_examples,
    digest,
    label_names,
    language_examples,
    preference_examples,
    read_rows,
    rejected_example,
)
from trainer.errors import ConfigError, DataError, TrainerError, TrainingError
from trainer.evaluate import Forgetting, forgetting_batches, language_loss
from trainer.expert_adapters import chosen_experts
from trainer.failures import in_one_line, is_disk_full, is_out_of_memory
from trainer.learning_rate import automatic_rate, losses_of
from trainer.limits import check_rows, use_known_padding, with_end_tokens
from trainer.loop import Result, check_trackers, optimise
from trainer.packing import refuse_leaking, refuse_recurrent
from trainer.report import Run
from trainer.start.initialise import Initialisation, calibration_batches, initialise, spectra_of
from trainer.start.methods import expert_starts
from trainer.targets import left_out


@dataclass(frozen=True)
class Data:
    """The tokenised rows of a run; `labels` are a classifier's, else empty."""

    train: list[Example]
    held_out: list[Example]
    labels: list[str]
    digest: str  # of the rows before tokenisation
    remarks: Mapping[str, int]  # number of rows for each remark of `Examples`

    def record(self, file: str) -> adapter_dir.Json:
        """Return the `data` of an adapter's provenance."""
        n = len(self.train) + len(self.held_out)
        return {"file": file, "digest": self.digest, "rows": n, "remarks": dict(self.remarks)}

    def label_record(self) -> adapter_dir.Json:
        """Return `id2label`, as transformers' configs have it, for a classifier."""
        return {"id2label": {str(i): name for i, name in enumerate(self.labels)}} if self.labels else {}


def train(base: str, data: str, out: Path, config: TrainConfig, progress: Progress, *, resume: bool = False) -> Run:
    """Train an adapter for `base` on `data` and write it to the new folder `out`.

    With `resume`, continue the unfinished run beside `out`, if there is one. Under `accelerate launch` all processes
    call this function. Raises TrainerError, and AdapterError for the base and the output folder. Nothing is then
    written to `out`, unless only the push to the hub failed. After Interrupted, and when the disk is full after a
    checkpoint, the unfinished run stays for `resume`; after other errors nothing stays.
    """
    with in_one_line(out):
        return _train(base, data, out, config, progress, resume=resume)


def _train(base: str, data: str, out: Path, config: TrainConfig, progress: Progress, *, resume: bool) -> Run:
    state = PartialState(cpu=not torch.cuda.is_available())  # joins the processes of accelerate launch
    adapter_dir.refuse_existing(out)
    if config.batch_size % (state.num_processes * config.gradient_accumulation):
        raise ConfigError(f"batch_size must be a multiple of processes ({state.num_processes}) x gradient_accumulation")
    check_trackers(config)
    folder = adapter_dir.find_base(base, code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config)
    rows = read_data(data, tokenizer, config, stop_tokens(folder, config))
    _print_remarks(data, rows, progress)
    torch.manual_seed(config.seed)
    model = load_base(folder, config, rows.labels)
    rows = fit_to_base(rows, data, model, tokenizer, config)
    model.config.pad_token_id = tokenizer.pad_token_id
    if config.stop_tokens and model.generation_config:
        model.generation_config.eos_token_id = sorted(stop_tokens(folder, config))
    if config.packing:
        refuse_recurrent(model)
        refuse_leaking(model)
    layers = {} if config.method == "full" else target_layers(model, config)
    experts = {} if config.method == "full" else chosen_experts(model, config)
    origin = _origin(base, folder, data, rows, str(model.dtype), config)
    identity = _identity(origin, tokenizer, config)
    resuming = unfinished.can_resume(out, identity, resume=resume)
    if state.is_main_process and config.method != "full":
        for line in left_out(model, config):
            progress.console.print(line, highlight=False, soft_wrap=True)

    with progress:
        calibration = calibration_batches(rows.train, tokenizer, config)
        lm = model if config.is_language_model else language_model(folder, config)
        forgetting_text = forgetting_batches(lm, tokenizer, config) if lm and config.forgetting_rows else []
        loss_before = language_loss(lm, forgetting_text) if lm else 0.0
        if resuming:
            start = unfinished.load(out)
        elif config.method == "full":
            start = Initialisation({})
        else:
            start = initialise(model, layers, calibration, config, origin["base"]["digest"], progress)
            start.starts.update(expert_starts(experts, config.rank))
        created = unfinished.create(out, identity, start) if state.is_main_process and not resuming else []
        state.wait_for_everyone()

        trained = attach(model, start.starts, config) if start.starts else model.requires_grad_(True)
        with _removed_after_errors(out, created):
            result = _optimise(trained, rows, tokenizer, config, out, progress)

            forgetting = None
            if forgetting_text:
                backbone = (trained.get_base_model() if start.starts else trained).base_model
                lm = trained if config.is_language_model else language_model(folder, config, backbone)
                assert lm is not None
                source_of_text = config.forgetting_data or "written by the base"
                forgetting = Forgetting(source_of_text, loss_before, language_loss(lm, forgetting_text))
            after = spectra_after(trained, calibration, config, progress) if start.eigenvalues else {}
            run = Run(origin, config, start, result, forgetting, after)
            if state.is_main_process:
                _write(out, trained, tokenizer, run, rows, folder)
    if state.is_main_process and config.push_to_hub:
        _push(out, config.push_to_hub)
    state.wait_for_everyone()
    return run


def _optimise(
    model: nn.Module,
    rows: Data,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    out: Path,
    progress: Progress,
) -> Result:
    """Train `model` in place, at the learning rate that `config` gives or leaves open. Raises TrainingError."""
    rate = config.learning_rate
    if rate == "auto":
        sample = random.Random(config.seed).sample(rows.train, min(config.batch_size, len(rows.train)))
        rate = automatic_rate(model, losses_of(model, sample, tokenizer, config), config)
        if PartialState().is_main_process:
            progress.console.print(f"learning rate {rate:.3g}, chosen from the gradients before the first step")
    checkpoint = unfinished.last_checkpoint(out, before=config.steps)
    folder = unfinished.folder_of(out)
    return optimise(model, tokenizer, rows.train, rows.held_out, config, rate, folder, checkpoint, progress)


@contextmanager
def _removed_after_errors(out: Path, created: Sequence[Path]) -> Iterator[None]:
    """Remove the unfinished run, and the folders `created` for it, after errors that need other settings.

    It would block the corrected command. After a full disk it stays if it has a checkpoint: `--resume` continues it.
    """
    try:
        yield
    except TrainingError:
        PartialState().wait_for_everyone()
        unfinished.remove(out, created)
        raise
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if is_out_of_memory(error) or (is_disk_full(error) and unfinished.last_checkpoint(out) is None):
            unfinished.remove(out, created)
        raise


def _write(
    out: Path, trained: nn.Module, tokenizer: PreTrainedTokenizerBase, run: Run, rows: Data, base_folder: Path
) -> None:
    """Write the adapter, or the whole model, to the new folder `out`, and remove the unfinished run."""
    with adapter_dir.new_folder(out) as finished:
        if isinstance(trained, PeftModel):
            base = run.origin["base"]["id"]
            settings = saved_config(trained, base) | rows.label_record()
            adapter = AstraAdapter(
                adapter_layers(trained, run.start.starts), settings, run.provenance(), trained_head(trained)
            )
            adapter_dir.save_astra(finished, adapter)
            report.write_defaults(finished, base_folder, tokenizer, run.config)
        else:
            report.save_whole_model(finished, trained, tokenizer, run)
        report.write(finished, run)
    unfinished.remove(out)


def _origin(base: str, folder: Path, data: str, rows: Data, dtype: str, config: TrainConfig) -> Json:
    """Return the adapter's provenance before training. A relative path of a base names another folder elsewhere."""
    name = os.path.abspath(base) if Path(base).is_dir() else base  # noqa: PTH100  links stay
    return report.provenance(name, folder, dtype, rows.record(Path(data).name), config) | rows.label_record()


def _identity(origin: Json, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Json:
    """Return all on which the run's result depends: a run is only continued with the same."""
    template = hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()
    digests = {"base": origin["base"]["digest"], "data": origin["data"]["digest"]}
    settings = {**config.model_dump(mode="json"), "chat_template": f"sha256:{template}"}  # not its file's name
    return {**settings, **digests, "checkpoints": "standard LoRA"}  # those of earlier versions held dA and dB


def read_data(data: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, stops: Collection[int] = ()) -> Data:
    """Return the tokenised training rows and held-out rows; a server ends answers at `stops`. Raises DataError."""
    rows = read_rows(data, config.split, config.columns)
    held_out = read_rows(config.eval_data, config.split, config.columns) if config.eval_data else []
    labels = label_names(rows, data) if config.task == "classification" else []
    if config.task == "classification" and len(labels) < 2:
        raise DataError(f"{data} needs at least two different values of label; it has: {', '.join(labels) or 'none'}")
    make: Callable[..., Examples] = partial(language_examples, stop_tokens=stops)
    if config.task == "dpo":
        make = partial(preference_examples, stop_tokens=stops)
    if labels:
        make = partial(classification_examples, names=labels)
    read = make(rows, tokenizer, config.max_length, data)
    read_test = make(held_out, tokenizer, config.max_length, config.eval_data) if config.eval_data else Examples()
    train, test = list(read), list(read_test)
    if config.eval_share:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()
        n = max(1, round(config.eval_share * len(train)))
        if n >= len(train):
            raise DataError(f"{data} has {len(train)} rows: too few to hold {config.eval_share:.0%} of them out")
        train, test = [train[i] for i in order[n:]], [train[i] for i in order[:n]]
    return Data(train, test, labels, digest([*rows, *held_out]), Counter(read.remarks) + read_test.remarks)


def _print_remarks(data: str, rows: Data, progress: Progress) -> None:
    if PartialState().is_main_process:
        for remark, n in rows.remarks.items():
            progress.console.print(
                f"{data}: {n} {'row' if n == 1 else 'rows'} {remark}", highlight=False, soft_wrap=True
            )


def fit_to_base(
    rows: Data, source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Data:
    """Return rows that `model` can read; pads with a token that it knows. Raises DataError for those it cannot read."""
    use_known_padding(tokenizer, model)
    train, held_out = (with_end_tokens(examples, model, config) for examples in (rows.train, rows.held_out))
    for examples, file in ((train, source), (held_out, config.eval_data or source)):
        others = [rejected_example(row) for row in examples] if config.task == "dpo" else []
        check_rows([*examples, *others], file, model, tokenizer, config)
    return replace(rows, train=train, held_out=held_out)


def spectra_after(
    model: PeftModel, calibration: list[Batch], config: TrainConfig, progress: Progress
) -> Mapping[str, torch.Tensor]:
    """Return the eigenvalues of the outputs of each adapted layer with its adapter, ascending (see `spectra_of`)."""
    modules = adapted_modules(model)
    trained = adapter_layers(model)
    model.eval()

    def weight_of(name: str) -> torch.Tensor:
        layer = trained[name]
        delta = config.scaling * (layer.b @ layer.a - layer.b0 @ layer.a0)
        return whole_weight(modules[name].get_base_layer()).float() + delta

    return spectra_of(model, modules, weight_of, calibration, config, progress)


def _push(out: Path, repository: str) -> None:
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out)
    except Exception as error:  # the hub's client and its transport raise many types; the adapter is on disk already
        raise TrainerError(f"{out} is complete, but {repository} could not be pushed: {first_line(error)}") from error
