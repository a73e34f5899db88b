"""Examples of the rows: token ids and labels, and how many rows were left out or cut."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from converter.errors import first_line
from trainer.data.batches import IGNORED, Example
from trainer.data.chat import turns
from trainer.data.files import Row
from trainer.data.labels import label_text
from trainer.data.tokens import prompt_and_completion
from trainer.errors import DataError

SKIPPED = "left out: the prompt alone reaches max_length"
CUT = "cut at max_length: the end of the answer is not learned"
REASONING_DROPPED = "without their separate reasoning, which the chat template does not render"


class Examples(list[Example]):
    """Examples in the order of their rows; `remarks` has the number of rows for each remark, such as SKIPPED."""

    def __init__(self, examples: Sequence[Example] = (), remarks: Counter[str] | None = None) -> None:
        super().__init__(examples)
        self.remarks: Counter[str] = remarks or Counter()


def language_examples(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str,
    stop_tokens: Collection[int] = (),
) -> Examples:
    """Return input_ids and labels (IGNORED on the prompt) of the rows, of at most `max_length` tokens.

    A server stops at `stop_tokens` and at the tokenizer's end-of-sequence token, which is added to a row without one of
    them at its end. A row whose prompt leaves no room for an answer is left out. Raises DataError with the row's
    number, or if no row is left.
    """
    examples, remarks = [], Counter[str]()
    longest = 0
    stops = stop_texts(tokenizer, stop_tokens)
    for number, row in enumerate(rows, 1):
        with in_row(source, number):
            found = list(answer_tokens(row, tokenizer, stops, remarks))
        for prompt, completion in found:
            if len(prompt) >= max_length:
                longest = max(longest, len(prompt))
                remarks[SKIPPED] += 1
                continue
            remarks[CUT] += len(prompt) + len(completion) > max_length
            labels = [IGNORED] * len(prompt) + completion
            examples.append({"input_ids": (prompt + completion)[:max_length], "labels": labels[:max_length]})
    if not examples:
        raise DataError(
            f"{source}: every prompt alone has at least {max_length} tokens, the longest {longest}: raise max_length"
        )
    return Examples(examples, +remarks)


def classification_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, source: str, names: Sequence[str]
) -> Examples:
    """Return the tokens of each row and the index of its label in `names`. Raises DataError with the row's number."""
    examples = []
    for number, row in enumerate(rows, 1):
        name = label_text(row.get("label"))
        match row:
            case {"text": str(text)} if text and name in names:
                tokens = tokenizer(text, row.get("text_pair") or None, truncation=True, max_length=max_length)
                examples.append({**tokens, "labels": names.index(name)})
            case _:
                raise DataError(
                    f'{source}, row {number}: a row must be {{"text", "label"}} with one of the labels '
                    f"{', '.join(names)}; this row has: {', '.join(row)}, label {row.get('label')!r}"
                )
    return Examples(examples)


@contextmanager
def in_row(source: str, number: int) -> Iterator[None]:
    """Raise DataError with the number of the row that cannot be used."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{source}, row {number}: {first_line(error)}") from error
    except TypeError as error:  # the error of `tokenizers` for an unpaired surrogate
        raise DataError(f"{source}, row {number}: the text is not Unicode: unpaired surrogate") from error


def stop_texts(tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int]) -> dict[int, str]:
    """Return the tokens at which a server stops, by their ids: the tokenizer's end of sequence is one."""
    return {i: tokenizer.convert_ids_to_tokens(i) for i in (tokenizer.eos_token_id, *stop_tokens) if i < len(tokenizer)}


def answer_tokens(
    row: Row, tokenizer: PreTrainedTokenizerBase, stops: Mapping[int, str], remarks: Counter[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of prompt and completion: one pair for each answer to learn. Raises ValueError and TypeError."""
    match row:
        case {"prompt": str(prompt), "completion": str(completion)} if completion:
            ids, learned = prompt_and_completion(prompt, completion, tokenizer, special=True)
            yield ids, _ended(learned, tokenizer, {tokenizer.eos_token_id})
        case {"text": str(text)} if text:
            yield [], _ended(tokenizer(text)["input_ids"], tokenizer, {tokenizer.eos_token_id})
        case {"messages": [_, *_] as messages}:
            yield from _chat_tokens(messages, row, tokenizer, stops, remarks)
        case {"prompt": [_, *_] as messages, "completion": list() as completion}:
            yield from _chat_tokens([*messages, *completion], row, tokenizer, stops, remarks)
        case {"chosen": _, "rejected": _}:
            raise ValueError("the row is a preference, with two answers: set task=dpo")
        case _:
            raise ValueError(
                'a row must be {"prompt", "completion"}, {"messages"} or {"text"}, each with non-empty text; '
                f"this row has: {', '.join(row)}"
            )


def _chat_tokens(
    messages: Sequence[Any],
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    stops: Mapping[int, str],
    remarks: Counter[str],
) -> Iterator[tuple[list[int], list[int]]]:
    for turn in turns(messages, tokenizer, row.get("tools"), row.get("chat_template_kwargs")):
        remarks[REASONING_DROPPED] += turn.reasoning_dropped
        stripped = turn.answer.rstrip()  # a server stops before white space that follows a stop token
        answer = stripped if stripped.endswith(tuple(stops.values())) else turn.answer
        # The template has added all special tokens; a server tokenises its output in the same way.
        ids, learned = prompt_and_completion(turn.prompt, answer, tokenizer, special=False)
        yield ids, _ended(learned, tokenizer, stops)


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> list[int]:
    return ids if ids[-1:] and ids[-1] in stops else [*ids, tokenizer.eos_token_id]
