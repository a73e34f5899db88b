"""An adapter that `astra-convert` has read, of whatever kind: the LoRA that it is against the original base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converter.adapter_dir import Json, LoraAdapter, Shape

Factors = tuple[torch.Tensor, torch.Tensor]  # lora_A (k, d_in), lora_B (d_out, k)


@dataclass(frozen=True)
class Residual:
    """A model whose weights are W - s B0 A0: the base without the initial product of the adapter."""

    folder: Path
    initial: Mapping[str, Factors]  # by module, float32: s B0 A0 = lora_B lora_A


@dataclass(frozen=True)
class Source:
    """An adapter to be converted; its layers are read when they are accessed."""

    factors: Mapping[str, Factors]  # by module, float32: delta W = lora_B lora_A, computed without cancellation
    apply_delta: Callable[[str, torch.Tensor], torch.Tensor]  # (module, x (d_in, n)) -> float64 delta W x
    shapes: dict[str, Shape]  # by module
    config: Json
    base: Json  # id, and the recorded digest and dtype, if any
    origin: Json  # kind, method and digests, for the provenance
    head: Mapping[str, torch.Tensor]
    plain_lora: LoraAdapter | None = None  # the adapter itself if it is a plain LoRA
    needs_base: str | None = None  # why it can be read only with the base, where it was opened without
    dropped: Sequence[str] = ()  # tensors of the folder that equal those of the base
    is_product: bool = True  # False: the exact rank is not that of the training, and can be any
    residual: Residual | None = None  # the model that was trained in place of the base, if it is available locally
