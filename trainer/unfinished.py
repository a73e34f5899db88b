"""A run that has not ended: the folder `OUT.unfinished` beside the output, from which `--resume` goes on.

    run.json            what is being trained: settings, digests of base and data, what calibration saw
    start.safetensors   A0 and B0 of every layer, and the eigenvalues before training
    checkpoint-N/       transformers' checkpoint of step N; `complete` in it says that all of it was written

The folder appears in one step, once every layer's start is known.
"""

import json
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
    """Return where the run towards `out` keeps what it needs to go on."""
    return out.with_name(f"{out.name}.unfinished")


def check(out: Path, identity: Json, *, resume: bool) -> bool:
    """Return whether there is an unfinished run of `identity` to go on with. Raises ResumeError."""
    folder = folder_of(out)
    if not folder.exists():
        return False
    if not resume:
        raise ResumeError(f"an unfinished run is in {folder}: go on with --resume, or remove it first")
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError) as error:
        raise ResumeError(f"{folder} is no unfinished run: remove it or choose another output folder") from error
    for key, value in json.loads(json.dumps(identity)).items():
        if found.get(key) != value:
            raise ResumeError(f"the unfinished run in {folder} has {key}={found.get(key)!r}, not {value!r}")
    return True


def begin(out: Path, identity: Json, initialisation: Initialisation) -> list[Path]:
    """Write the folder; return the folders above it that had to be made. Raises CannotWrite."""
    folder = folder_of(out)
    made = [parent for parent in out.parents if not parent.exists()]
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
        facts = {
            "identity": identity,
            "spectra": {name: found.as_json() for name, found in initialisation.spectra.items()},
            "convergence": [asdict(estimate) for estimate in initialisation.convergence],
        }
        (partial / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    return made


def load(out: Path) -> Initialisation:
    """Return what `begin` wrote."""
    folder = folder_of(out)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "start.safetensors")
    names = [key.removesuffix(".A0") for key in tensors if key.endswith(".A0")]
    return Initialisation(
        {name: Start(tensors[f"{name}.A0"], tensors[f"{name}.B0"]) for name in names},
        {name: Spectrum(**found) for name, found in facts["spectra"].items()},
        {key.removesuffix(".eigenvalues"): t for key, t in tensors.items() if key.endswith(".eigenvalues")},
        [Estimate(**estimate) for estimate in facts["convergence"]],
    )


def mark_complete(checkpoint: Path) -> None:
    """Say that all of `checkpoint` is on the disk."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    (checkpoint / COMPLETE).touch()


def last_checkpoint(out: Path, *, before: int) -> Path | None:
    """Return the newest checkpoint before step `before` of which all was written.

    From a checkpoint of the last step transformers would train one more.
    """
    complete = {int(file.parent.name.split("-")[1]): file.parent for file in folder_of(out).glob(f"*/{COMPLETE}")}
    steps = [step for step in complete if step < before]
    return complete[max(steps)] if steps else None


def remove(out: Path, made: Sequence[Path] = ()) -> None:
    """Remove the folder, and those of `made` that are empty: the run has ended."""
    shutil.rmtree(folder_of(out), ignore_errors=True)
    with suppress(OSError):
        for parent in made:
            parent.rmdir()
