"""The base model: its local folder, its digest, its dtype and its weights."""

import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from converter.adapter_dir.base_names import loaded_modules, stored_names
from converter.adapter_dir.errors import BaseNotFound
from converter.adapter_dir.folder import digest
from converter.adapter_dir.layers import Layers
from converter.errors import first_line

WEIGHTS = "model.safetensors"
TIED_HEAD = "lm_head"
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]
# Files of other kinds that may lie beside a base's own: an adapter saved there, and Mistral's copy of the weights.
_STRAY = ("adapter_", "consolidated")


class BaseModules(NamedTuple):
    """The modules of a base by name, as adapters, PEFT and engines name them; see `base_names.LoadedModules`."""

    shapes: dict[str, tuple[int, int]]  # (d_out, d_in) of every matrix, by each of its names
    models: tuple[frozenset[str], ...]
    served: frozenset[str]


def find_base(base: str, *, download: bool = True, code: bool = False) -> Path:
    """Return the local folder of `base`, which is a path or a hub id.

    A hub id is downloaded unless it is in the hub's cache; with `download=False` only the cache is searched. With
    `code`, Python files are downloaded, too. Raises BaseNotFound.
    """
    path = Path(base)
    if not path.is_dir():
        if path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
            raise BaseNotFound(f"base model {base!r} is not a folder: give a local model folder or a hub id (org/name)")
        patterns = [*_FILES, "*.py"] if code else _FILES
        try:
            path = Path(snapshot_download(base, allow_patterns=patterns, local_files_only=not download))
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


def is_stray(file: Path) -> bool:
    """Return whether a file in a base's folder belongs to an adapter or to another copy of the weights."""
    return file.name.startswith(_STRAY)


def weight_files(folder: Path) -> list[Path]:
    """Return the files from which transformers loads the base's weights, in the order of their names.

    They are model.safetensors, else the files that its index names, else all safetensors files that are not stray.
    Raises BaseNotFound.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return sorted(file for file in folder.glob("*.safetensors") if not is_stray(file))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / Path(name).name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseNotFound(f"{index} cannot be read: it must have a weight_map of file names ({error})") from error
    for file in files:
        if not file.is_file():
            raise BaseNotFound(f"base model file {file} is missing: {index.name} names it")
    return files


@contextmanager
def without_stray_files(folder: Path) -> Iterator[Path]:
    """Yield a folder with the base's own files: `folder`, or links to its files if an adapter was saved there, too.

    transformers would otherwise load that adapter with the base.
    """
    if not any(is_stray(file) for file in folder.iterdir()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            if not is_stray(file):
                (Path(temporary) / file.name).symlink_to(file.absolute())
        yield Path(temporary)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the base by its name on disk; reads only the headers of its weight files.

    Raises BaseNotFound.
    """
    shapes = {}
    for file in weight_files(folder):
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is not a dict)
                shapes[key] = tuple(tensors.get_slice(key).get_shape())
    return shapes


def base_modules(folder: Path) -> BaseModules:
    """Return the modules of the base, with the shape (d_out, d_in) of every matrix.

    A matrix is there by its name on disk and by its names in the loaded models. GPT-2's matrices are transposed:
    (d_in, d_out). An output layer that is tied to the embedding is not stored: `lm_head` has the embedding's shape.
    Reads only the headers of the weight files. Raises BaseNotFound.
    """
    stored = stored_shapes(folder)
    matrices = {name.removesuffix(".weight"): (s[0], s[1]) for name, s in stored.items() if len(s) == 2}
    embedding = _tied_embedding(folder, matrices)
    tied = {TIED_HEAD: matrices[embedding]} if embedding else {}
    loaded = loaded_modules(folder, stored)
    return BaseModules(matrices | loaded.shapes | tied, loaded.models, loaded.served)


def base_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the shapes of `base_modules`. Raises BaseNotFound."""
    return base_modules(folder).shapes


def base_parameters(folder: Path) -> Layers[torch.Tensor]:
    """Return the base's tensors by name, with a tied output layer, which is not stored, as `lm_head.weight`.

    Raises BaseNotFound, here and at each access.
    """
    weights = base_weights(folder)
    embedding = _tied_embedding(folder, {name.removesuffix(".weight") for name in stored_shapes(folder)})
    tied = {f"{TIED_HEAD}.weight": f"{embedding}.weight"} if embedding else {}
    return Layers([*weights, *tied], lambda name: weights[tied.get(name, name)])


def base_dtype(folder: Path) -> str:
    """Return the dtype in the base's config, such as `bfloat16`; without one, transformers' default, `float32`.

    Raises BaseNotFound.
    """
    config = _config(folder)
    found = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(found)


def vocabulary_size(folder: Path) -> int | None:
    """Return the number of rows of the base's embedding as its config has it, None without. Raises BaseNotFound."""
    config = _config(folder)
    text = config.get("text_config")
    found = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return found if type(found) is int else None


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
    """Return the tensors of all weight files of a base, by their names on disk and by their names in the loaded model.

    Raises BaseNotFound, here and at each access.
    """
    files = [base_tensors(file) for file in weight_files(folder)]
    file_of = {name: tensors for tensors in files for name in tensors}
    stored = stored_names(folder, file_of) | {name: name for name in file_of}
    return Layers(list(stored), lambda name: file_of[stored[name]][stored[name]])


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
