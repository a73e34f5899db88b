"""The methods: settings of the trainer for each, and starts that are only tried here.

A tried start is a function of what the trainer has at hand before it attaches an adapter. One that turns out to be
worth it becomes an option of the trainer, the others stay as a record (benchmarks/README.md, "Tried").
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trainer.adapter import Start
from trainer.config import TrainConfig
from trainer.data import Batch

MakeStarts = Callable[[PreTrainedModel, Mapping[str, nn.Linear], list[Batch], TrainConfig], Mapping[str, Start]]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "pissa": {"method": "pissa"},
    "milora": {"method": "milora"},
    "corda": {"method": "corda"},
    "eva": {"method": "eva"},
    "lora_ga": {"method": "lora_ga"},
    "mica": {"method": "mica"},
    "full": {"method": "full"},
    "tail": {"method": "astra"},
    "principal": {"method": "astra", "subspace": "principal"},
    "middle": {"method": "astra", "subspace": "middle"},
    "random": {"method": "astra", "subspace": "random"},
    "tail, B frozen": {"method": "astra", "train_b": False},
}
TRIED: dict[str, tuple[dict[str, Any], MakeStarts]] = {}


def settings_of(method: str) -> dict[str, Any]:
    """Return the trainer's settings for a method, tried ones included."""
    return METHODS[method] if method in METHODS else TRIED[method][0]


def make_starts(method: str) -> MakeStarts | None:
    """Return how a tried method starts; None for the trainer's own."""
    return TRIED[method][1] if method in TRIED else None
