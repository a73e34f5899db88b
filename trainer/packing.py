"""Whether rows that are packed into one row stay apart.

A packed row has the position ids 0 1 2 0 1 2 3, and attention is masked where they start again. A recurrent layer
(Mamba, linear attention, a convolution over tokens) and attention without position ids continue from the row before.
"""

import torch
from transformers import PreTrainedModel

from trainer.errors import ConfigError

_RECURRENT = {"linear_attention", "conv", "mamba", "recurrent", "hybrid"}  # values of `layer_types` in configs
_LENGTH = 8  # tokens of each of the two rows that are compared
# Largest difference, as a share of the largest logit. Where rows stay apart it is 0, but 8-bit layers round by batch.
_TOLERANCE, _QUANTISED_TOLERANCE = 1e-5, 1e-2


def refuse_recurrent(model: PreTrainedModel) -> None:
    """Raise ConfigError if the model's class or config says that it has recurrent layers; needs no weights."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if getattr(model, "_is_stateful", False) or _RECURRENT & {*layer_types}:
        raise _leaks(model)


@torch.no_grad()
def refuse_leaking(model: PreTrainedModel) -> None:
    """Raise ConfigError if a packed row changes the logits of the row after it; computes two rows of 16 tokens."""
    n_tokens = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(n_tokens, (3, _LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.arange(_LENGTH, device=model.device).repeat(2)[None]
    try:
        first, second = (
            # With a cache, transformers does not look for packed rows; training has none.
            model(input_ids=torch.cat([row, tokens[2]])[None], position_ids=positions, use_cache=False)
            .logits[0, _LENGTH:]
            .float()
            for row in tokens[:2]
        )
    except (TypeError, ValueError) as error:  # a model without position ids
        raise _leaks(model) from error
    tolerance = _QUANTISED_TOLERANCE if getattr(model.config, "quantization_config", None) else _TOLERANCE
    if float((first - second).abs().max()) > tolerance * float(first.abs().max()):
        raise _leaks(model)


def _leaks(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        f"packing: in {type(model).__name__} a row would change the rows that are packed after it: set packing=false"
    )
