"""The folder of a run that has not ended, `OUT.unfinished` beside the output; `--resume` continues from it.

    run.json            settings, digests of base and data, spectra and convergence of the calibration
    start.safetensors   A0 and B0 of every layer, and the eigenvalues before training
    checkpoint-N/       transformers' checkpoint of step N; the file `complete` in it marks it as fully written

The folder is created by a rename after the initialisation: a run that stops earlier leaves no folder.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from converter import atomic
from converter.adapter_dir import CannotWrite, Json
from trainer.adapter import Start
from trainer.errors import ResumeError
from trainer.start.eigenspace import Spectrum
from trainer.start.initialise import Estimate, Initialisation

COMPLETE = "complete"


def folder_of(out: Path) -> Path:
    """Return the folder of the unfinished run whose output is `out`."""
    return out.with_name(f"{out.name}.unfinished")


def can_resume(out: Path, identity: Json, *, resume: bool) -> bool:
    """Return whether there is an unfinished run to continue.

    Raises ResumeError when there is one and `resume` is false, when it differs from `identity` (base, data, settings),
    or when its record cannot be read.
    """
    folder = folder_of(out)
    if not folder.exists():
        return False
    if not resume:
        raise ResumeError(f"an unfinished run is in {folder}: continue it with --resume, or remove the folder")
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError) as error:
        raise ResumeError(f"{folder} is not an unfinished run: remove it or choose another output folder") from error
    for key, value in json.loads(json.dumps(identity)).items():
        if found.get(key) != value:
            raise ResumeError(f"the unfinished run in {folder} has {key}={found.get(key)!r}, not {value!r}")
    return True


def create(out: Path, identity: Json, initialisation: Initialisation) -> list[Path]:
    """Write the folder; return the parent folders that it created. Raises CannotWrite."""
    folder = folder_of(out)
    created = [parent for parent in out.parents if not parent.exists()]
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(atomic.new_folder(folder))
        except OSError as error:
            raise CannotWrite(f"output folder {out} cannot be made: {error.strerror}") from error
        tensors: dict[str, torch.Tensor] = {}
        for name, start in initialisation.starts.items():
            tensors |= {f"{name}.A0": start.a0.contiguous(), f"{name}.B0": start.b0.contiguous()}
        tensors |= {f"{name}.eigenvalues": values for name, values in initialisation.eigenvalues.items()}
        save_file(tensors, partial / "start.safetensors")
        record = {
            "identity": identity,
            "spectra": {name: found.as_json() for name, found in initialisation.spectra.items()},
            "convergence": [asdict(estimate) for estimate in initialisation.convergence],
        }
        (partial / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return created


def load(out: Path) -> Initialisation:
    """Return the initialisation that `create` wrote."""
    folder = folder_of(out)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "start.safetensors")
    names = [key.removesuffix(".A0") for key in tensors if key.endswith(".A0")]
    return Initialisation(
        {name: Start(tensors[f"{name}.A0"], tensors[f"{name}.B0"]) for name in names},
        {name: Spectrum(**found) for name, found in record["spectra"].items()},
        {key.removesuffix(".eigenvalues"): t for key, t in tensors.items() if key.endswith(".eigenvalues")},
        [Estimate(**estimate) for estimate in record["convergence"]],
    )


def mark_complete(checkpoint: Path) -> None:
    """Flush the files of `checkpoint` to disk, then mark it as complete."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    (checkpoint / COMPLETE).touch()


def last_checkpoint(out: Path, *, before: float = math.inf) -> Path | None:
    """Return the newest complete checkpoint of a step below `before`, or None.

    A checkpoint of the last step is not used: transformers would train one more step from it.
    """
    complete = {int(file.parent.name.split("-")[1]): file.parent for file in folder_of(out).glob(f"*/{COMPLETE}")}
    steps = [step for step in complete if step < before]
    return complete[max(steps)] if steps else None


def remove(out: Path, created: Sequence[Path] = ()) -> None:
    """Remove the folder of an ended run, and the folders of `created` that are empty."""
    shutil.rmtree(folder_of(out), ignore_errors=True)
    with suppress(OSError):
        for parent in created:
            parent.rmdir()
