"""Token ids of a prompt and its completion.

TRL tokenises prompt and completion as one text. A token may then span their boundary, and training sees another prompt
than a server does. Here the prompt's ids are those that a server makes from the prompt alone. The completion's ids are
the rest of the joint text, if that begins with the prompt's ids.

If it does not, the completion is tokenised alone, but never as the beginning of a text: there SentencePiece tokenizers
(Llama 2, Mistral, Phi-3) add a blank that the data does not have.
"""

from transformers import PreTrainedTokenizerBase

# Text before the completion whose tokens are cut off again; the first one that no token joins with the completion.
_PREFIXES = ("\n", "\u263a", ":", "x")


def prompt_and_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, as a server makes them, and of the completion.

    `special`: whether the tokenizer adds its special tokens, such as the beginning of a sequence, to the prompt. Text
    that a chat template renders has them already. Raises TypeError for text with an unpaired surrogate.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    joint: list[int] = tokenizer(prompt + completion, add_special_tokens=special)["input_ids"]
    if joint[: len(ids)] == ids:
        return ids, joint[len(ids) :]
    return ids, _inside_a_text(completion, tokenizer)


def _inside_a_text(completion: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of text that other text precedes."""
    for prefix in _PREFIXES:
        before: list[int] = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        ids: list[int] = tokenizer(prefix + completion, add_special_tokens=False)["input_ids"]
        if before and ids[: len(before)] == before and tokenizer.decode(ids).endswith(completion):
            return ids[len(before) :]
    # The tokenizer changes the text (capitals, accents), so that no prefix can be proved to be neutral.
    alone: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return alone
