"""Reading and checking of a folder that astra-train wrote, as a `Run` (see `trainer.report`)."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from converter.adapter_dir import (
    ASTRA_WEIGHTS,
    PROVENANCE,
    AstraAdapter,
    Json,
    MalformedAdapter,
    NotAnAdapter,
    load_astra,
    read_json,
)
from trainer.config import TrainConfig
from trainer.evaluate import Forgetting
from trainer.loop import Point, Result
from trainer.report import SPECTRA, Run
from trainer.start.eigenspace import Spectrum
from trainer.start.initialise import Estimate, Initialisation

_FULL_FORMAT = "astra-full/1"


class _Base(BaseModel):
    id: str
    digest: str
    dtype: str


class _Data(BaseModel):
    file: str
    digest: str
    rows: int


class _Evaluation(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, float]
    step: int
    eval_loss: float


class _Record(BaseModel):
    """The required content of `astra.json`; fields that older versions did not record have defaults."""

    base: _Base
    data: _Data
    config: TrainConfig
    spectra: dict[str, Spectrum] = {}
    convergence: list[Estimate] = []
    evaluations: list[_Evaluation] = []
    best_step: int | None = None
    forgetting: Forgetting | None = None
    learning_rate: float | None = None


def read_run(folder: Path) -> tuple[Run, AstraAdapter | None]:
    """Return the run that wrote `folder`, and its adapter, or None after full fine-tuning.

    The run's `starts` are empty; so are its curve and its eigenvalues if their files are missing. Raises NotAnAdapter
    and MalformedAdapter.
    """
    full = None if (folder / ASTRA_WEIGHTS).is_file() else _fully_trained(folder)
    adapter = load_astra(folder) if full is None else None
    origin = adapter.provenance if adapter else full
    if origin and origin.get("data", "") is None:
        raise NotAnAdapter(f"{folder} was saved from Python, without a record of its training to report on")
    try:
        record = _Record.model_validate(origin)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MalformedAdapter(f"{folder / PROVENANCE} does not match this version: {where}: {first['msg']}") from error
    before, after = _eigenvalues(folder, record.spectra)
    start = Initialisation({}, record.spectra, before, record.convergence)
    evaluations = [evaluation.model_dump() for evaluation in record.evaluations]
    rate = record.learning_rate or record.config.learning_rate  # older versions recorded it in the settings alone
    if rate == "auto":
        raise MalformedAdapter(f"{folder / PROVENANCE} does not have the learning_rate that auto chose")
    result = Result(_curve(folder), evaluations, record.best_step, rate)
    return Run(origin or {}, record.config, start, result, record.forgetting, after), adapter


def _fully_trained(folder: Path) -> Json | None:
    """Return the provenance of a folder with a fully fine-tuned model; None for any other folder."""
    if not (folder / PROVENANCE).is_file():
        return None
    content = read_json(folder, PROVENANCE)
    return content if content.get("format") == _FULL_FORMAT else None


def _curve(folder: Path) -> list[Point]:
    file = folder / "loss.jsonl"
    if not file.is_file():
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return TypeAdapter(list[Point]).validate_python([json.loads(line) for line in lines])
    except ValueError as error:  # JSON's, UTF-8's and pydantic's own errors are ValueErrors
        raise MalformedAdapter(f"{file} has a line without step, loss, grad_norm and learning_rate") from error
    except OSError as error:
        raise MalformedAdapter(f"{file} cannot be read: {error.strerror}") from error


def _eigenvalues(
    folder: Path, found: Mapping[str, Spectrum]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the eigenvalues of the layers' outputs before and after training, ascending, by layer name."""
    file = folder / SPECTRA
    values: dict[str, dict[str, torch.Tensor]] = {"before": {}, "after": {}}
    tensors = {}
    if file.is_file():
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise MalformedAdapter(f"{file} cannot be read: {error}") from error
    for key, tensor in tensors.items():
        name, _, when = key.rpartition(".")
        if when not in values or name not in found:
            raise MalformedAdapter(f"{file} holds {key}, but {PROVENANCE} has no such spectrum")
        if tensor.ndim != 1 or not 0 < len(tensor) <= found[name].dimension or not tensor.isfinite().all():
            raise MalformedAdapter(f"{file}: {key} is not a list of up to {found[name].dimension} finite eigenvalues")
        values[when][name] = tensor
    return values["before"], values["after"]
