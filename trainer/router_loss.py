"""The load-balancing loss of mixtures of experts, as TRL computes it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def settings(model: nn.Module) -> dict[str, float]:
    """Return TRL's settings of this loss for `model`.

    It is off where the config could name experts, but names none (the dense models of Granite 4): TRL 1.16 would read
    the logits of a router that does not exist, and training would end with an IndexError.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]  # of a PreTrainedModel or a PeftModel
    return {"router_aux_loss_coef": 0.0} if getattr(config, "num_local_experts", None) == 0 else {}


@contextmanager
def number_of_experts(model: nn.Module) -> Iterator[None]:
    """Let TRL find the number of experts in the config of `model`, until the block ends.

    TRL 1.16 reads `num_experts` for every model that returns the logits of its router. The configs of PhiMoE,
    GraniteMoE and Granite 4 call this number `num_local_experts` only, and training would end with an AttributeError.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]  # of a PreTrainedModel or a PeftModel
    if hasattr(config, "num_experts") or not hasattr(config, "num_local_experts"):
        yield
        return
    config.num_experts = config.num_local_experts
    try:
        yield
    finally:
        del config.num_experts  # full fine-tuning saves the config
