"""A conversation as the prompt that a server renders, and the text of the answer that follows it.

    prompt   what the base's chat template renders for the messages before the answer, with the generation prompt
    answer   what the template renders after that, when the answer is among the messages

So what is learned is found in the rendered text, to the byte: a template that parses `<think>`, trims text or writes
tool calls in a format of its own has done so.

Some generation prompts begin the answer ("prefill"), and the model writes the rest. If the rendered answer does not
begin with the prefill, the answer is the text that follows the prefill:

- The prefill opens a block of reasoning, and the template renders answers without their reasoning (R1 distillates,
  DeepSeek-V3): the row's reasoning and the end of the block, then the rendered answer. Without reasoning the block is
  closed at once.
- The prefill opens a block, and the template renders an empty block (Nemotron 3): the end of the block, and the rest.
- The template renders no block, or another text that each answer begins with: the rendered answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.data.conversation import Message, checked_messages, learned_turns, listed_tools, reasoning_of
from trainer.data.template import Template, complete_template

_OPENED = re.compile(r"<([^<>/\s]*think[^<>/\s]*)>\s*\Z", re.IGNORECASE)  # a block of reasoning, open at the end


@dataclass(frozen=True)
class Turn:
    """One answer to learn, and whether the template leaves its separate reasoning out."""

    prompt: str
    answer: str
    reasoning_dropped: bool


def turns(
    messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, tools: Any = None, settings: Any = None
) -> list[Turn]:
    """Return the answers to learn of a conversation, each with its prompt (see `learned_turns`).

    `tools` are the functions that the prompt lists, `settings` (such as `enable_thinking`) are given to the template.
    Raises ValueError for messages that cannot be used, or that the template does not render completely.
    """
    checked = checked_messages(messages)
    positions = learned_turns(checked)
    if not tokenizer.chat_template:
        raise ValueError(
            '"messages" need a chat template, which this base does not have: use "prompt" and "completion"'
        )
    if not isinstance(settings or {}, Mapping):
        raise ValueError(f'"chat_template_kwargs" must be a JSON object, not {type(settings).__name__}')
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    template = complete_template(Template(tokenizer, listed_tools(tools), given), checked)
    return [_turn(template, checked[:i], checked[i]) for i in positions]


def _turn(template: Template, earlier: Sequence[Message], answer: Message) -> Turn:
    prompt = template.render(earlier, ask=True)
    whole = template.render([*earlier, answer])
    learned = whole[len(prompt) :] if whole.startswith(prompt) else _after_prefill(template, earlier, answer, prompt)
    if not learned.strip():
        raise ValueError("this base's chat template does not render the answer")
    return Turn(prompt, learned, reasoning_dropped=reasoning_of(answer).strip() not in learned)


def _after_prefill(template: Template, earlier: Sequence[Message], answer: Message, prompt: str) -> str:
    """Return what a model writes after a prompt with which the rendered conversation does not begin."""
    whole = template.render([*earlier, answer])
    asked_at = _shared(template.render(earlier), prompt)  # where the generation prompt begins
    if not whole.startswith(prompt[:asked_at]):
        raise ValueError("this base's chat template renders the earlier turns differently when an answer follows")
    opened = _OPENED.search(prompt, asked_at)
    if opened and whole.startswith(prompt[: opened.start()]):
        return _after_opened_block(answer, whole[opened.start() :], opened)
    header = _shared(*(template.render([*earlier, {"role": "assistant", "content": text}]) for text in ("0", "1")))
    if not prompt.startswith(whole[:header]):
        raise ValueError(
            f"this base's chat template begins the answer with {prompt[asked_at:]!r}, and renders this row's answer "
            'otherwise: change the answer, or the prompt with "chat_template_kwargs"'
        )
    return whole[header:]


def _after_opened_block(answer: Message, rendered: str, opened: re.Match[str]) -> str:
    """Return what follows a prompt that opens a block of reasoning, given the rendered answer without that opening."""
    prefill, start, end = opened[0], f"<{opened[1]}>", f"</{opened[1]}>"
    if rendered.startswith(start):
        return rendered.removeprefix(start)
    if end in rendered:  # the row's answer is as the model writes it: without the start that the prompt has
        return rendered
    content = "".join(answer["content"])
    reasoning, closed, _ = content.rpartition(end)
    if closed:
        return reasoning.removeprefix(prefill).removeprefix(start) + end + rendered
    return reasoning_of(answer).strip("\n") + f"\n{end}\n\n{rendered}"


def _shared(first: str, second: str) -> int:
    """Return the number of characters that are equal at the beginning of two texts."""
    unequal = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(unequal, min(len(first), len(second)))
