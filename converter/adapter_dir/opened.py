"""An adapter folder of PEFT's layout, opened: its kind, config, tensors and their names; no numbers are read yet."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from converter.adapter_dir.errors import MalformedAdapter, NotAnAdapter, UnsafeAdapter
from converter.adapter_dir.folder import CONFIG, Json, file_in, read_json
from converter.adapter_dir.lora_config import DORA, LOHA, LOKR, LORA, PARTS, check_config, check_peft_type, read_kind
from converter.adapter_dir.names import TensorNames, read_names
from converter.adapter_dir.tensors import PickledTensors, TensorFile, TensorFiles

LORA_WEIGHTS = "adapter_model.safetensors"
WEIGHTS_INDEX = "adapter_model.safetensors.index.json"
ASTRA_WEIGHTS = "astra_weights.safetensors"
MAX_SHARDS = 1000
SHARD = r"adapter_model-\d{1,6}-of-\d{1,6}\.safetensors"  # the name of each
PICKLED_WEIGHTS = "adapter_model.bin"
# Parts of the names of tensors, and the kinds of adapter that have them.
_MARKS = {".lora_A": (LORA, DORA), ".lora_magnitude_vector": (DORA,), ".hada_": (LOHA,), ".lokr_": (LOKR,)}

Tensors = TensorFile | TensorFiles | PickledTensors


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter of another tool as its folder has it."""

    folder: Path
    kind: str  # LORA, DORA, LOHA or LOKR
    alpha: str  # the name of alpha in the config
    config: Json
    tensors: Tensors
    names: TensorNames

    def shape(self, module: str, part: str) -> tuple[int, ...]:
        """Return the shape of one part of a layer, which the file has."""
        return self.tensors.shapes[self.names.parts[module][part]]


def open_adapter(folder: Path, *, allow_pickle: bool = False) -> OpenedAdapter:
    """Open an adapter folder; reads its config and the headers of its weights.

    With `allow_pickle`, adapter_model.bin is read if there is no safetensors file: by PyTorch's weights-only unpickler,
    all layers at once. Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    check_there(folder)
    config = read_json(folder, CONFIG)
    kind = read_kind(folder, config)
    tensors = _open(folder, allow_pickle)
    _check_kind(folder, kind, tensors)
    alpha = "alpha" if kind in (LOHA, LOKR) else "lora_alpha"
    config = check_config(folder, config, alpha)
    check_peft_type(folder, config)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise MalformedAdapter(f"{folder / CONFIG}: modules_to_save must be a list of names")
    names = read_names(folder, tensors, PARTS[kind])
    if not names.parts:
        raise MalformedAdapter(f"{folder} contains no {'LoRA' if kind == LORA else kind}")
    return OpenedAdapter(folder, kind, alpha, config, tensors, names)


def check_there(folder: Path) -> None:
    """Raise NotAnAdapter where a folder has no adapter, with the folder below it that has one, if there is one."""
    if (folder / CONFIG).exists() or not folder.is_dir():
        return
    found = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    if not found:
        return
    newest = max(found, key=lambda path: [int(number) for number in re.findall(r"\d{1,18}", path.name)])
    others = "" if len(found) == 1 else f" (also in {', '.join(path.name for path in found if path != newest)[:200]})"
    raise NotAnAdapter(f"{folder} has no {CONFIG}, but {newest.name} in it has one{others}: give {newest}")


def check_readable(folder: Path) -> None:
    """Raise NotAnAdapter or UnsafeAdapter, with the reason, for a folder without weights that a server may read."""
    check_there(folder)
    if not weight_files(folder):
        _open(folder, allow_pickle=False)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files of an adapter: one, or an index and its shards; none for a pickle.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    if os.path.lexists(folder / LORA_WEIGHTS) or not os.path.lexists(folder / WEIGHTS_INDEX):
        return [LORA_WEIGHTS] if os.path.lexists(folder / LORA_WEIGHTS) else []
    return [WEIGHTS_INDEX, *shards_of(folder)]


def shards_of(folder: Path) -> list[str]:
    """Return the names of the shards in the index of an adapter, sorted. Raises as `weight_files`."""
    where, weight_map = folder / WEIGHTS_INDEX, read_json(folder, WEIGHTS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedAdapter(f"{where} has no weight_map from tensors to files")
    names = {name for name in weight_map.values() if isinstance(name, str) and re.fullmatch(SHARD, name)}
    if len(names) > MAX_SHARDS or not all(isinstance(name, str) and name in names for name in weight_map.values()):
        raise MalformedAdapter(
            f"{where}: weight_map may name up to {MAX_SHARDS} files adapter_model-X-of-Y.safetensors"
        )
    return sorted(names)


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of weights and config of an adapter, in the order of its digest.

    Raises NotAnAdapter, UnsafeAdapter and MalformedAdapter.
    """
    names = weight_files(folder) or [PICKLED_WEIGHTS if (folder / PICKLED_WEIGHTS).exists() else LORA_WEIGHTS]
    return [file_in(folder, name) for name in (*names, CONFIG)]


def _open(folder: Path, allow_pickle: bool) -> Tensors:
    names = weight_files(folder)
    if names == [LORA_WEIGHTS]:
        return TensorFile(folder, LORA_WEIGHTS)
    if names:
        weight_map = read_json(folder, WEIGHTS_INDEX)["weight_map"]
        return TensorFiles(folder, names[1:], weight_map)
    if (folder / ASTRA_WEIGHTS).is_file():
        raise NotAnAdapter(f"{folder} is an Astra adapter: convert it first (astra-convert {folder} OUT_DIR)")
    if not (folder / PICKLED_WEIGHTS).is_file():
        if shards := sorted(path.name for path in folder.glob("adapter_model-*.safetensors")):
            raise NotAnAdapter(f"{folder} has {shards[0]} without {WEIGHTS_INDEX}: copy the index, too")
        return TensorFile(folder, LORA_WEIGHTS)  # raises NotAnAdapter
    if not allow_pickle:
        raise UnsafeAdapter(
            f"{folder / PICKLED_WEIGHTS} is a pickle, which can run code: convert it with astra-convert {folder} "
            "OUT_DIR --allow-pickle"
        )
    return PickledTensors(folder, PICKLED_WEIGHTS)


def _check_kind(folder: Path, kind: str, keys: Iterable[str]) -> None:
    """Raise MalformedAdapter where the config says another kind of adapter than the tensors do."""
    for key in keys:
        for mark, kinds in _MARKS.items():
            if mark in key and kind not in kinds:
                says = (
                    f"{folder / CONFIG} has peft_type={LORA if kind == DORA else kind!r}: engines serve plain LoRA only"
                )
                raise MalformedAdapter(f"{says}, and {key[:200]!r} is a tensor of a {kinds[0]}: copy its own {CONFIG}")
