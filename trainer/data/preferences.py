"""Examples of preference rows: a prompt with the answer that is chosen, and with the one that is rejected."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from trainer.data.batches import IGNORED, REJECTED, Example
from trainer.data.examples import CUT, SKIPPED, Examples, answer_tokens, in_row, stop_texts
from trainer.data.files import Row
from trainer.errors import DataError

SAME = "left out: chosen and rejected are the same, as far as max_length goes"


def preference_examples(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str,
    stop_tokens: Collection[int] = (),
) -> Examples:
    """Return the chosen answer of each row as an example of `language_examples`, with the rejected answer in it.

    A row has `prompt`, `chosen` and `rejected`: texts, or lists of messages. Where both answers are whole
    conversations, the messages that they share at the beginning are the prompt. Raises DataError with the row's number,
    or if no row is left.
    """
    examples, remarks = [], Counter[str]()
    stops = stop_texts(tokenizer, stop_tokens)
    for number, row in enumerate(rows, 1):
        with in_row(source, number):
            pair = [list(answer_tokens(answer, tokenizer, stops, remarks))[-1] for answer in _answers(row)]
        (prompt, chosen), (_, rejected) = pair
        room = max_length - len(prompt)
        if room <= 0:
            remarks[SKIPPED] += 1
        elif chosen[:room] == rejected[:room]:
            remarks[SAME] += 1
        else:
            remarks[CUT] += max(len(chosen), len(rejected)) > room
            labels = [IGNORED] * len(prompt) + chosen[:room]
            examples.append({"input_ids": prompt + chosen[:room], "labels": labels, REJECTED: rejected[:room]})
    if not examples:
        reasons = "; ".join(f"{n} {remark}" for remark, n in (+remarks).items())
        raise DataError(f"{source} has no row to learn from: {reasons}")
    return Examples(examples, +remarks)


def rejected_example(example: Example) -> Example:
    """Return the prompt of a preference with the answer that is rejected."""
    n_prompt = example["labels"].count(IGNORED)
    ids = example["input_ids"][:n_prompt] + example[REJECTED]
    return {"input_ids": ids, "labels": [IGNORED] * n_prompt + example[REJECTED]}


def as_trl(example: Example) -> dict[str, list[int]]:
    """Return a preference as TRL's DPOTrainer has it: the ids of prompt, chosen and rejected answer."""
    n_prompt = example["labels"].count(IGNORED)
    prompt, chosen = example["input_ids"][:n_prompt], example["input_ids"][n_prompt:]
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": example[REJECTED]}


def _answers(row: Row) -> tuple[Row, Row]:
    """Return the row of the chosen and that of the rejected answer, each with the prompt. Raises ValueError."""
    others: Row = {key: row[key] for key in ("tools", "chat_template_kwargs") if key in row}
    match row:
        case {"prompt": str(prompt), "chosen": str(chosen), "rejected": str(rejected)} if chosen and rejected:
            answers: list[Row] = [{"prompt": prompt, "completion": answer} for answer in (chosen, rejected)]
        case {"prompt": [_, *_] as prompt, "chosen": [_, *_] as chosen, "rejected": [_, *_] as rejected}:
            answers = [{"messages": [*prompt, *answer], **others} for answer in (chosen, rejected)]
        case {"chosen": [_, *_] as chosen, "rejected": [_, *_] as rejected}:
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
            if shared == 0:
                raise ValueError('"chosen" and "rejected" have no message in common that could be the prompt')
            answers = [{"messages": [*answer[: shared + 1]], **others} for answer in (chosen, rejected)]
        case _:
            raise ValueError(
                'a row must be {"prompt", "chosen", "rejected"}, each non-empty text or a list of messages; '
                f"this row has: {', '.join(row)}"
            )
    return answers[0], answers[1]
