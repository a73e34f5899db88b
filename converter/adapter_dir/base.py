"""The base model: its local folder, its digest, its dtype and its weights."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from converter.adapter_dir.errors import BaseNotFound
from converter.adapter_dir.folder import digest
from converter.adapter_dir.layers import Layers
from converter.errors import first_line

TIED_HEAD = "lm_head"
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]


def find_base(base: str, *, download: bool = True) -> Path:
    """Return the local folder of `base`, which is a path or a hub id.

    A hub id is downloaded unless it is in the hub's cache; with `download=False` only the cache is searched. Raises
    BaseNotFound.
    """
    path = Path(base)
    if not path.is_dir():
        if path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
            raise BaseNotFound(f"base model {base!r} is not a folder: give a local model folder or a hub id (org/name)")
        try:
            path = Path(snapshot_download(base, allow_patterns=_FILES, local_files_only=not download))
        except (OSError, ValueError) as error:  # the hub's errors are OSErrors and ValueErrors
            raise BaseNotFound(
                f"base model {base!r} is not a local folder and cannot be fetched from the hub: {first_line(error)}"
            ) from error
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise BaseNotFound(f"base model {base!r} has no config.json beside *.safetensors: is it a transformers model?")
    return path


def base_digest(folder: Path) -> str:
    """Return the SHA-256 of the names and bytes of the base's weight files, as `sha256:...`."""
    return digest(sorted(folder.glob("*.safetensors")))


def base_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every matrix of the base by module name; reads only the headers of its weight files.

    An output layer that is tied to the embedding is not stored: `lm_head` has the embedding's shape. Raises
    BaseNotFound.
    """
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is not a dict)
                shape = tensors.get_slice(key).get_shape()
                if len(shape) == 2:
                    shapes[key.removesuffix(".weight")] = (shape[0], shape[1])
    if embedding := _tied_embedding(folder, shapes):
        shapes[TIED_HEAD] = shapes[embedding]
    return shapes


def base_parameters(folder: Path) -> Layers[torch.Tensor]:
    """Return the base's tensors by name, with a tied output layer, which is not stored, as `lm_head.weight`.

    Raises BaseNotFound, here and at each access.
    """
    weights = base_weights(folder)
    embedding = _tied_embedding(folder, {key.removesuffix(".weight") for key in weights})
    tied = {f"{TIED_HEAD}.weight": f"{embedding}.weight"} if embedding else {}
    return Layers([*weights, *tied], lambda name: weights[tied.get(name, name)])


def base_dtype(folder: Path) -> str:
    """Return the dtype in the base's config, such as `bfloat16`; without one, transformers' default, `float32`.

    Raises BaseNotFound.
    """
    config = _config(folder)
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(found)


def base_tensors(file: Path) -> Layers[torch.Tensor]:
    """Return the tensors of one weight file of a base by name; a tensor is read when it is accessed.

    Raises BaseNotFound, here and at each access.
    """

    def read(name: str) -> torch.Tensor:
        with _opened(file) as tensors:  # unmapped after each read: mapped pages would count as the process's memory
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    with _opened(file) as tensors:
        return Layers(sorted(tensors.keys()), read)


def base_weights(folder: Path) -> Layers[torch.Tensor]:
    """Return the tensors of all weight files of a base by name. Raises BaseNotFound, here and at each access."""
    files = [base_tensors(file) for file in sorted(folder.glob("*.safetensors"))]
    file_of = {name: tensors for tensors in files for name in tensors}
    return Layers(list(file_of), lambda name: file_of[name][name])


def _tied_embedding(folder: Path, modules: Collection[str]) -> str | None:
    """Return the module whose weights the output layer of a language model shares, if it is not stored itself."""
    config = _config(folder) if (folder / "config.json").is_file() else {}
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    architectures = [name for name in config.get("architectures") or () if isinstance(name, str)]
    has_head = any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures)
    if not has_head or False in (config.get("tie_word_embeddings"), text.get("tie_word_embeddings")):
        return None
    if any(module.rpartition(".")[2] == TIED_HEAD for module in modules):
        return None
    found = [module for module in modules if module.rpartition(".")[2] in ("embed_tokens", "wte")]
    return found[0] if len(found) == 1 else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BaseNotFound(f"{folder / 'config.json'} cannot be read: it is not a JSON object")
    return config


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise BaseNotFound(f"base model file {file} cannot be read: {error}") from error
