"""`--merge`: the base with the adapter in its weights, as a checkpoint of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from converter.adapter_dir import AdapterError, base_tensors, write_json, write_tensors
from converter.adapter_dir.tensors import DTYPES
from converter.sources import Source

FORMAT = "astra-merged/1"
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # config, tokenizer, the index of the weight files


def merge(source: Source, base: Path, out: Path, on_layer: Callable[[], None]) -> None:
    """Write `base` with W + delta W into the folder `out`: the same files and names, one tensor in memory at a time.

    The sums are taken in float32 and rounded to the base's own dtype. Raises AdapterError.
    """
    if source.head:
        raise AdapterError("a classifier's head has no place in its base: convert without --merge")
    left = set(source.factors)

    def merged(name: str, weight: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module not in source.factors:
            return weight
        if weight.dtype not in DTYPES.values():
            raise AdapterError(f"{name!r} is {weight.dtype}: nothing can be merged into a quantised base")
        lora_a, lora_b = source.factors[module]
        change = lora_b @ lora_a
        total = weight.float().add_(change.T if source.config.get("fan_in_fan_out") else change).to(weight.dtype)
        if not total.isfinite().all():
            raise AdapterError(f"{name!r} with the adapter overflows {weight.dtype}")
        left.discard(module)
        on_layer()
        return total

    for file in sorted(base.glob("*.safetensors")):
        tensors = base_tensors(file)
        together = ((name, merged(name, weight)) for name, weight in tensors.items())
        write_tensors(out / file.name, tensors, together, {"format": "pt"})
    if left:
        raise AdapterError(f"the base has no weight for {sorted(left)[0]!r}")
    for pattern in _BESIDE:
        for file in base.glob(pattern):
            shutil.copyfile(file, out / file.name)


def record(out: Path, provenance: dict[str, object]) -> None:
    """Write beside a merged model where it came from."""
    write_json(out / "astra.json", {"format": FORMAT, **provenance})
