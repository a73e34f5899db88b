"""What a base can read: its number of positions, and its number of token embeddings; whether the rows fit into them."""

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import TrainConfig
from trainer.data import Example
from trainer.errors import DataError


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that a row may have, or None if the base sets no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa counts positions from padding_idx + 1.
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return min(found, module.num_embeddings - module.padding_idx - 1)
    return found


def use_known_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Pad with the end token if the padding token has no embedding: padding is masked, but it is looked up."""
    if tokenizer.pad_token_id >= _embeddings(model) and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token


def check_rows(
    rows: Iterable[Example],
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
) -> None:
    """Raise DataError if a row has more tokens than the base has positions, or a token without an embedding.

    `source` names the rows' file in the message. `model` may be on the meta device.
    """
    positions, known = max_positions(model), _embeddings(model)
    longest = config.max_length if config.packing else 0
    for row in rows:
        longest = max(longest, len(row["input_ids"]))
        unknown = max(row["input_ids"])
        if unknown >= known:
            raise DataError(
                f"{source} contains the token {tokenizer.convert_ids_to_tokens(unknown)!r} ({unknown}), but the base "
                f"has {known} token embeddings: remove it from the data, or give a base that was resized for it"
            )
    if positions is not None and longest > positions:
        raise DataError(
            f"{source} has a row of {longest} tokens, but the base has {positions} positions: "
            f"set max_length to {positions} or less"
        )


def with_end_tokens(rows: Sequence[Example], model: PreTrainedModel, config: TrainConfig) -> list[Example]:
    """Return a classifier's rows for an encoder-decoder, which reads its answer at the last end token.

    Rows without an end token, as some tokenizers write them, get one; others and other models' rows stay as they are.
    """
    end = getattr(model.config, "eos_token_id", None)
    if config.task != "classification" or not model.config.is_encoder_decoder or not isinstance(end, int):
        return list(rows)
    return [row if end in row["input_ids"] else _with_end_token(row, end, config.max_length) for row in rows]


def _with_end_token(row: Example, end: int, max_length: int) -> Example:
    """Return a row with the token `end` behind its others, the last of which is cut off if the row is full."""
    longer = {key: values[: max_length - 1] for key, values in row.items() if key != "labels"}
    longer = {key: [*values, end if key == "input_ids" else values[-1]] for key, values in longer.items()}
    return {**longer, "labels": row["labels"]}


def _embeddings(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)
