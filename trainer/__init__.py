"""Training of Astra adapters: calibration, subspaces, initialisation, optimisation (Liu et al., arXiv 2602.19111).

From Python: `get_astra_model` puts an adapter on a model for any training loop (`initialize_lora_astra_weights` where a
trainer has put it there), `save_lora` writes it as a standard LoRA, `save_adapter` and `load_adapter` interrupt the
training and go on (see `trainer.python_api`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.python_api import (
        get_astra_model,
        initialize_lora_astra_weights,
        load_adapter,
        save_adapter,
        save_lora,
    )

__all__ = ["get_astra_model", "initialize_lora_astra_weights", "load_adapter", "save_adapter", "save_lora"]


def __getattr__(name: str) -> Any:
    """Import a function when it is used: it needs transformers, and the command line starts without."""
    if name in __all__:
        return getattr(importlib.import_module("trainer.python_api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
