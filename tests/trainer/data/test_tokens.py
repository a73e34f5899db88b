"""Token ids of prompt and completion: the prompt's are a server's, and together they are the text."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.data import language_examples
from trainer.data.batches import IGNORED
from trainer.data.tokens import prompt_and_completion

_TEXTS = ["Answer with the code only.\nCode:\nSELECT a FROM b", "Is it good? [yes]", "Name: a b c", "yes no yes no"] * 4
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def sentencepiece(prepend: str) -> PreTrainedTokenizerFast:
    """A tokenizer with Llama's blank at the beginning of a text, added by a normalizer or by a pre-tokenizer."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    found = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"], byte_fallback=True, fuse_unk=True))
    if prepend == "normalizer":
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*_SPECIAL.values(), *bytes_]
    found.train_from_iterator(_TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    described = json.loads(found.to_str())
    described["added_tokens"] = described["added_tokens"][: len(_SPECIAL)]  # bytes are ordinary tokens
    found = Tokenizer.from_str(json.dumps(described))
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=found, **_SPECIAL)


@pytest.fixture(scope="module", params=["normalizer", "pre_tokenizer", "byte level"])
def any_tokenizer(request, tokenizer) -> PreTrainedTokenizerFast:
    return tokenizer if request.param == "byte level" else sentencepiece(request.param)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Answer with the code only.\nCode:\n", "SELECT a"),
        ("Answer with the code only.\nCode:", " SELECT a"),
        ("Code:\n", " two blanks"),
        ("Is it good? [", "yes]"),
        ("Is it good? ", "yes"),
        ("Is it go", "od?"),
        ("Name:", "\n\nx"),
        ("Name:\n", "\nx"),
        ("", "yes"),
        ("yes", "é☺ no"),
    ],
)
def test_the_ids_of_the_prompt_are_a_servers_and_all_ids_are_the_text(any_tokenizer, prompt, completion) -> None:
    ids, learned = prompt_and_completion(prompt, completion, any_tokenizer, special=True)
    assert ids == any_tokenizer(prompt)["input_ids"]
    assert any_tokenizer.decode(ids + learned, skip_special_tokens=True) == prompt + completion


@pytest.mark.parametrize("prepend", ["normalizer", "pre_tokenizer"])
def test_a_completion_begins_without_a_blank_that_the_data_does_not_have(prepend) -> None:
    words = sentencepiece(prepend)
    rows = [{"prompt": "Code:\n", "completion": "SELECT a"}, {"prompt": "Is it good? ", "completion": "yes"}]
    for row, example in zip(rows, language_examples(rows, words, 64, "rows"), strict=True):
        learned = [label for label in example["labels"] if label != IGNORED]
        assert not words.convert_ids_to_tokens(learned)[0].startswith("▁")
        assert words.decode(learned, skip_special_tokens=True) == row["completion"]


@pytest.mark.parametrize("prepend", ["normalizer", "pre_tokenizer"])
def test_an_answer_in_a_chat_begins_without_a_blank(prepend) -> None:
    words = sentencepiece(prepend)
    words.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' if m.role == 'user' }}{{ m.content }}"
        "{{ ']' if m.role == 'user' else eos_token }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "yes"}]
    (example,) = language_examples([{"messages": messages}], words, 64, "rows")
    whole = words.apply_chat_template(messages, tokenize=False)
    assert whole == "<s>[Is it good?]yes</s>"
    assert words.decode(example["input_ids"]).replace("<s> ", "<s>") == whole
    assert words.decode([label for label in example["labels"] if label != IGNORED]) == "yes</s>"


def test_the_rest_of_the_joint_text_is_learned_where_it_begins_with_the_prompt(tokenizer) -> None:
    prompt, completion = "def f(x):", "\n    return x"
    ids, learned = prompt_and_completion(prompt, completion, tokenizer, special=True)
    assert ids + learned == tokenizer(prompt + completion)["input_ids"]


def test_a_tokenizer_that_changes_the_text_still_gives_the_completion(tokenizer) -> None:
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token
    )
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    ids, learned = prompt_and_completion("A: ", "YES", lower, special=True)
    assert lower.decode(ids + learned) == "a: yes"
