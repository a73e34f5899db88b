"""`--merge`: write the base with the adapter added to its weights, as a checkpoint of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from converter.adapter_dir import PROVENANCE, AdapterError, base_tensors, base_weights, write_json, write_tensors
from converter.adapter_dir.base import TIED_HEAD, is_stray, stored_shapes, weight_files
from converter.adapter_dir.base_names import stored_names
from converter.adapter_dir.tensors import DTYPES
from converter.source import Source

MERGED_FORMAT = "astra-merged/1"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # config, tokenizer, index of the weight files


def merge(source: Source, base: Path, out: Path, on_layer: Callable[[], None]) -> None:
    """Write `base` with weights W + delta W into the existing folder `out`, under the same file and tensor names.

    One tensor is in memory at a time. Sums are computed in float32 and rounded to the base's own dtype. An adapter in
    the base's folder, and other copies of the weights, are left out. `on_layer` is called after each layer. Raises
    AdapterError.
    """
    if source.head:
        raise AdapterError("--merge cannot write a classifier's head, which the base does not have: leave --merge out")
    on_disk = stored_names(base, stored_shapes(base))
    module_of = {on_disk.get(f"{module}.weight", f"{module}.weight"): module for module in source.factors}
    missing = set(source.factors)
    if (TIED_HEAD in missing) and f"{TIED_HEAD}.weight" not in base_weights(base):
        raise AdapterError(
            "--merge cannot change lm_head: the output layer shares its weights with the embedding; leave --merge out"
        )

    def merged(name: str, weight: torch.Tensor) -> torch.Tensor:
        module = module_of.get(name)
        if module is None:
            return weight
        if weight.dtype not in DTYPES.values():
            raise AdapterError(f"{name!r} is {weight.dtype}: nothing can be merged into a quantised base")
        lora_a, lora_b = source.factors[module]
        change = lora_b @ lora_a
        total = weight.float().add_(change.T if source.config.get("fan_in_fan_out") else change).to(weight.dtype)
        if not total.isfinite().all():
            raise AdapterError(f"{name!r} with the adapter overflows {weight.dtype}")
        missing.discard(module)
        on_layer()
        return total

    for file in weight_files(base):
        tensors = base_tensors(file)
        pairs = ((name, merged(name, weight)) for name, weight in tensors.items())
        write_tensors(out / file.name, tensors, pairs, {"format": "pt"})
    if missing:
        raise AdapterError(f"the base has no tensor on disk that is the weight of {sorted(missing)[0]!r}")
    for pattern in _COPIED:
        for file in base.glob(pattern):
            if not is_stray(file):
                shutil.copyfile(file, out / file.name)


def save_merged_provenance(out: Path, provenance: dict[str, object]) -> None:
    """Write `astra.json`, the provenance of the merged model in `out`."""
    write_json(out / PROVENANCE, {"format": MERGED_FORMAT, **provenance})
