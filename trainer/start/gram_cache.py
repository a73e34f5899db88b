"""A cache of Gram matrices on disk: for the same base, rows and layers, another rank or subspace needs no pass."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from converter import atomic
from trainer.start.calibration import Gram


def cache_folder(root: str, *identity: str) -> Path:
    """Return the folder of the matrices that `identity` (digests and settings) determines."""
    return Path(root).expanduser() / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:32]


def store(folder: Path, grams: Mapping[str, Gram]) -> None:
    """Write one safetensors file per layer, each in one step. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, gram in grams.items():
        metadata = {"n_tokens": str(gram.n_tokens), "energy": gram.energy.hex(), "of_inputs": str(gram.of_inputs)}
        with atomic.new_file(_file(folder, name)) as partial:
            save_file({"gram": gram.matrix.cpu()}, partial, metadata=metadata)


def load(folder: Path, name: str, device: torch.device) -> Gram | None:
    """Return the matrix of layer `name`, or None if there is no readable file."""
    try:
        with safe_open(_file(folder, name), framework="pt") as file:
            metadata = file.metadata()
            matrix = file.get_tensor("gram").to(device)
        n_tokens, energy = int(metadata["n_tokens"]), float.fromhex(metadata["energy"])
        return Gram(matrix, n_tokens, energy, of_inputs=metadata["of_inputs"] == "True")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
