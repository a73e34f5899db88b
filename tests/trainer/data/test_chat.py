"""The learned part of a conversation: the text that the chat template renders after the prompt of a server.

The templates are published ones, as TRL's package has them.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trainer.data import IGNORED, language_examples
from trainer.data.chat import turns
from trainer.data.examples import REASONING_DROPPED
from trainer.errors import DataError

_TRL = importlib.util.find_spec("trl")
assert _TRL is not None
assert _TRL.origin is not None
TEMPLATES = Path(_TRL.origin).parent / "chat_templates"

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "sky", "parameters": {"type": "object"}}}]
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
REASONED = "<think>\nSums are easy.\n</think>\n\nho"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return assistant(None, tool_calls=[{"id": "call12345", "type": "function", "function": function}])


RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "call12345", "name": "weather"}


@pytest.fixture
def using(tokenizer: PreTrainedTokenizerFast, monkeypatch):
    """Give the tokenizer a published template, by its name in TRL."""

    def use(name: str) -> PreTrainedTokenizerFast:
        template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        monkeypatch.setattr(tokenizer, "chat_template", "{% set bos_token = '' %}" + template)
        return tokenizer

    return use


@pytest.mark.parametrize(
    "template",
    ["cohere", "gemma", "gemma3", "gemma4", "glm4moe", "gptoss", "lfm2", "llama3", "llama3_2", "phi3", "phi3_5",
     "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_6", "qwen3_vl", "smolvlm"],
)  # fmt: skip
@pytest.mark.parametrize(
    "messages",
    [
        [user("hi"), assistant("ho")],
        [user("one"), assistant("first"), user("two"), assistant("second")],
        [user("hi"), assistant(REASONED)],
        [user("one"), assistant(REASONED), user("two"), assistant(REASONED)],
        [user("hi"), assistant("ho", reasoning_content="Sums are easy.")],
        [user(" hi "), assistant("  x = 1\n")],
        [user("hi"), assistant("<think")],
    ],
    ids=["plain", "two turns", "reasoning", "earlier reasoning", "separate reasoning", "white space", "part of a tag"],
)
def test_prompt_and_answer_are_the_text_that_the_template_renders(using, template: str, messages) -> None:
    tokenizer = using(template)
    given = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if template == "smolvlm" else m for m in messages
    ]
    (turn,) = turns(messages, tokenizer)
    assert turn.prompt == tokenizer.apply_chat_template(given[:-1], tokenize=False, add_generation_prompt=True)
    assert turn.prompt + turn.answer == tokenizer.apply_chat_template(given, tokenize=False)


@pytest.mark.parametrize(
    ("template", "answer", "learned"),
    [
        ("deepseek_r1_distill", assistant(REASONED), "Sums are easy.\n</think>\n\nho" + DEEPSEEK_END),
        ("deepseek_r1_distill", assistant("why\n</think>\n\nho"), "why\n</think>\n\nho" + DEEPSEEK_END),
        ("deepseek_r1_distill", assistant("<think>why</think>ho"), "why</think>ho" + DEEPSEEK_END),
        ("deepseek_r1_distill", assistant("ho", reasoning="why"), "why\n</think>\n\nho" + DEEPSEEK_END),
        ("deepseek_r1_distill", assistant("<b>ho"), "\n</think>\n\n<b>ho" + DEEPSEEK_END),
        ("deepseekv3", assistant(REASONED), "Sums are easy.\n</think>\n\nho" + DEEPSEEK_END),
        ("deepseekv3", assistant("ho"), "\n</think>\n\nho" + DEEPSEEK_END),
        ("nemotron_3_nano", assistant(REASONED), "Sums are easy.\n</think>\n\nho<|im_end|>\n"),
        ("nemotron_3_nano", assistant("ho", reasoning_content="why"), "why\n</think>\nho<|im_end|>\n"),
        ("nemotron_3_nano", assistant("ho"), "</think>ho<|im_end|>\n"),
        ("nemotron_3_ultra", assistant("why\n</think>\n\nho"), "why\n</think>\n\nho<|im_end|>\n"),
        ("qwen3_5_think", assistant(REASONED), "Sums are easy.\n</think>\n\nho<|im_end|>\n"),
        ("qwen3_5_nothink", assistant("ho"), "ho<|im_end|>\n"),
    ],
)
def test_what_follows_a_prefill_is_learned(using, template: str, answer, learned: str) -> None:
    tokenizer = using(template)
    (turn,) = turns([user("hi"), answer], tokenizer)
    assert turn.prompt == tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    assert turn.answer == learned
    assert not turn.reasoning_dropped


def test_a_prefill_without_reasoning_is_left_out_of_the_answer(tokenizer, monkeypatch) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: Answer: {% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (turn,) = turns([user("hi"), assistant("Answ")], tokenizer)
    assert (turn.prompt, turn.answer) == ("user: hi\nassistant: Answer: ", "Answ\n")
    (turn,) = turns([user("hi"), assistant("Answer: ho")], tokenizer)
    assert turn.prompt + turn.answer == "user: hi\nassistant: Answer: ho\n"


def test_reasoning_behind_a_closed_prefill_is_refused_or_opened_by_the_row(using) -> None:
    tokenizer, messages = using("qwen3_5_nothink"), [user("hi"), assistant(REASONED)]
    with pytest.raises(ValueError, match=r"begins the answer with .* change the answer, or the prompt with"):
        turns(messages, tokenizer)
    (turn,) = turns(messages, tokenizer, settings={"enable_thinking": True})
    assert turn.prompt.endswith("<think>\n")
    assert turn.answer == "Sums are easy.\n</think>\n\nho<|im_end|>\n"


def test_an_answer_is_cut_after_the_stop_token_and_otherwise_ended(using) -> None:
    row = {"messages": [user("hi"), assistant(REASONED)]}
    tokenizer = using("qwen3")
    template = tokenizer.chat_template

    def learned(end: str, *stops: str) -> str:
        tokenizer.chat_template = template.replace("<|im_end|>", end)
        ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
        (example,) = language_examples([row], tokenizer, 512, "rows", [*ids, 10**6])
        return tokenizer.decode([label for label in example["labels"] if label != IGNORED])

    answer = "<think>\nSums are easy.\n</think>\n\nho"
    assert learned("<|end|>") == f"{answer}<|end|>"  # the tokenizer's end-of-sequence token
    assert learned("<|user|>", "<|user|>") == f"{answer}<|user|>"  # a stop token of the generation config
    assert learned("<|user|>") == f"{answer}<|user|>\n<|end|>"
    assert learned("") == f"{answer}\n<|end|>"


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "gptoss", "llama3_2", "glm4moe", "nemotron_3_nano"])
@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_tools_and_calls_are_rendered_as_a_server_renders_them(using, template: str, arguments) -> None:
    tokenizer = using(template)
    messages, parsed = [user("weather?"), call(arguments)], [user("weather?"), call({"city": "Paris"})]
    parsed[1]["content"] = ""
    for as_column in (TOOLS, json.dumps(TOOLS)):
        (turn,) = turns(messages, tokenizer, tools=as_column)
        settings = {"tools": TOOLS, "tokenize": False}
        assert turn.prompt == tokenizer.apply_chat_template(parsed[:1], add_generation_prompt=True, **settings)
        if template != "nemotron_3_nano":  # its prefill has a line break that its rendered answer does not have
            assert turn.prompt + turn.answer == tokenizer.apply_chat_template(parsed, **settings)
        assert "weather" in turn.answer
        assert "Paris" in turn.answer


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "gptoss", "llama3_2", "glm4moe", "qwen2_5"])
def test_the_answer_after_a_call_is_learned_and_the_call_is_in_its_prompt(using, template: str) -> None:
    (turn,) = turns([user("weather?"), call("{}"), RESULT, assistant("It is sunny.")], using(template), TOOLS)
    assert "It is sunny." in turn.answer
    assert turn.prompt.count("sunny") == 1
    assert "weather" in turn.prompt.partition("weather?")[2]
    assert turn.prompt != turns([user("weather?"), assistant("x")], using(template), TOOLS)[0].prompt


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "deepseekv3"])
def test_a_template_that_adds_arguments_to_text_gets_them_as_text(using, template: str) -> None:
    (turn,) = turns([user("weather?"), call({"city": "Paris"})], using(template))
    assert "weather\n```json\n" in turn.answer
    assert '{"city": "Paris"}' in turn.answer


@pytest.mark.parametrize(
    ("template", "messages", "tools", "reason"),
    [
        ("llama3", [user("hi"), assistant("ho")], TOOLS, 'does not render "tools": remove the column'),
        ("lfm2", [user("hi"), call("{}")], None, "does not render tool calls"),
        ("phi3", [user("hi"), call("{}"), RESULT, assistant("ho")], None, "does not render tool calls"),
        ("gemma", [{"role": "system", "content": "x"}, user("hi"), assistant("ho")], None, "System role not supported"),
        ("qwen3", [user("hi"), assistant("ho")], "{oops", '"tools" must be a list of JSON objects'),
        ("qwen3", [user("hi"), assistant(None, tool_calls=[{"function": {}}])], None, 'needs "function" with a "name"'),
        ("qwen3", [user([{"type": "image_url"}]), assistant("ho")], None, "is not text"),
        ("qwen3", [user("hi"), assistant(None)], None, "non-empty"),
        ("qwen3", [user("hi"), assistant("ho", weight=0)], None, "every assistant turn has weight 0"),
        ("qwen3", [user("hi"), assistant("ho", weight=0.5)], None, '"weight" of a message must be 0 or 1, not 0.5'),
    ],
)
def test_what_a_template_leaves_out_or_a_row_lacks_is_refused_in_one_line(
    using, template: str, messages, tools, reason: str
) -> None:
    with pytest.raises(DataError, match="rows, row 1: ") as caught:
        language_examples([{"messages": messages, "tools": tools}], using(template), 512, "rows")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_earlier_turns_that_change_when_an_answer_follows_are_refused(tokenizer, monkeypatch) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="renders the earlier turns differently when an answer follows"):
        turns([user("hi"), assistant("ho")], tokenizer)


def test_an_answer_that_is_not_rendered_is_refused(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="does not render the answer"):
        turns([user("hi"), assistant("ho")], tokenizer)


def test_reasoning_that_is_not_rendered_is_counted(using) -> None:
    row = {"messages": [user("hi"), assistant("ho", reasoning_content="why")]}
    assert language_examples([row], using("llama3"), 512, "rows").remarks == {REASONING_DROPPED: 1}
    assert not language_examples([row], using("qwen3"), 512, "rows").remarks


@pytest.mark.parametrize(
    ("weights", "learned"),
    [
        ((None, None, None), ["third"]),
        ((0, None, None), ["third"]),
        ((None, None, 0), ["second"]),
        ((None, 0, 0), ["first"]),
        ((1, 0, 1), ["first", "third"]),
        ((1, None, None), ["first", "third"]),
        ((1, 1, 1), ["first", "second", "third"]),
    ],
)
def test_the_last_turn_is_learned_and_weights_choose_others(using, weights, learned: list[str]) -> None:
    answers = [
        assistant(text, weight=weight) for text, weight in zip(("first", "second", "third"), weights, strict=True)
    ]
    messages = [message for answer in answers for message in (user("go on"), answer)]
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    tokenizer = using("llama3")
    found = turns(messages, tokenizer)
    assert [turn.answer for turn in found] == [f"{text}<|eot_id|>" for text in learned]
    for turn, text in zip(found, learned, strict=True):
        n = 1 + next(i for i, message in enumerate(plain) if message["content"] == text)
        assert turn.prompt + turn.answer == tokenizer.apply_chat_template(plain[:n], tokenize=False)


@pytest.mark.parametrize("template", ["qwen3", "llama3", "gemma3", "qwen3_5_think", "glm4moe", "smolvlm"])
def test_text_parts_are_text(using, template: str) -> None:
    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    split, whole = (
        turns([user(content), assistant(answer)], using(template))
        for content, answer in ((parts("hi"), parts("ho")), ("hi", "ho"))
    )
    assert split == whole
    (several,) = turns([user(parts("one", "two")), assistant(parts("ho"))], using(template))
    assert "one\ntwo" in several.prompt or "onetwo" in several.prompt
    assert "ho" in several.answer
