"""Gram matrices on disk: another rank or subspace for the same base, rows and layers costs no forward pass."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converter import atomic
from trainer.start.calibration import Gram


def cache_folder(root: str, *identity: str) -> Path:
    """Return the folder for what `identity` (digests and settings) determines."""
    return Path(root).expanduser() / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]


def store(folder: Path, grams: Mapping[str, Gram]) -> None:
    """Write one safetensors file per layer; a file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, gram in grams.items():
        facts = {"n_tokens": str(gram.n_tokens), "energy": gram.energy.hex(), "of_inputs": str(gram.of_inputs)}
        with atomic.new_file(_file(folder, name)) as partial:
            save_file({"gram": gram.matrix.cpu()}, partial, metadata=facts)


def fetch(folder: Path, name: str, device: torch.device) -> Gram | None:
    """Return a layer's matrix; None where there is none, or the file cannot be read."""
    try:
        with safe_open(_file(folder, name), framework="pt") as file:
            facts = file.metadata()
            matrix = file.get_tensor("gram").to(device)
        return Gram(
            matrix, int(facts["n_tokens"]), float.fromhex(facts["energy"]), of_inputs=facts["of_inputs"] == "True"
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
