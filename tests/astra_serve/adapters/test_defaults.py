"""Settings of an adapter for its requests: template, defaults of sampling, stop tokens; and the refused ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from astra_serve.adapters.admission import Admitted, Base
from astra_serve.adapters.defaults import BaseTokenizer, Defaults, _Generation, read_defaults
from astra_serve.errors import ServeError
from converter import adapter_dir

ROWS = 100
OF_BASE = "{{ messages }}{{ eos_token }}"


@pytest.fixture
def of_base(tmp_path: Path) -> BaseTokenizer:
    """The tokenizer of a base with 100 rows, whose tokens are `t0` to `t89`, and `<end>`, which was added."""
    folder = tmp_path / "base"
    folder.mkdir()
    write(folder, "config.json", {"vocab_size": ROWS})
    vocabulary = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(90)}, "unk_token": "t0"}
    added = {"id": 90, "content": "<end>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    content = {"version": "1.0", "model": vocabulary, "added_tokens": [{**added, "normalized": False}]}
    write(folder, "tokenizer.json", content)
    write(folder, "tokenizer_config.json", {"eos_token": "<end>"})
    (folder / adapter_dir.CHAT_TEMPLATE).write_text(OF_BASE)
    return BaseTokenizer(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "adapter"
    found.mkdir()
    return found


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def test_an_adapter_without_such_files_has_no_defaults(folder, of_base) -> None:
    assert read_defaults(folder, of_base) == (Defaults(), [])


def test_a_template_of_its_own_is_compiled_and_kept_with_its_format(folder, of_base) -> None:
    named = {
        "default": "{{ messages[0].content }}",
        "tool_use": "{% for p in messages[0].content %}{{ p.text }}{% endfor %}",
    }
    listed = [{"name": name, "template": text} for name, text in named.items()]
    write(folder, "tokenizer_config.json", {"chat_template": listed, "eos_token": "t7"})
    defaults, notes = read_defaults(folder, of_base)
    assert defaults.template is not None
    assert defaults.template.template.special_tokens == {"eos_token": "t7"}
    assert defaults.template.chosen(with_tools=False) == (named["default"], "string")
    assert defaults.template.chosen(with_tools=True) == (named["tool_use"], "openai")
    assert notes == []


def test_a_template_that_is_the_bases_needs_no_worker_and_is_noted(folder, of_base) -> None:
    (folder / adapter_dir.CHAT_TEMPLATE).write_text(OF_BASE)
    assert read_defaults(folder, of_base) == (Defaults(), ["its chat template is the base's"])
    write(folder, "tokenizer_config.json", {"eos_token": "t7"})
    assert read_defaults(folder, of_base)[0].template is not None  # it may write another token
    (folder / "tokenizer_config.json").unlink()
    otherwise_served = BaseTokenizer(of_base._folder, as_served=False)  # --chat-template
    assert read_defaults(folder, otherwise_served)[0].template is not None


@pytest.mark.parametrize("text", ["{{ messages", "{% for %}", "{{ a | no_such_filter }}", "{{ " + "(" * 9000 + "1"])
def test_a_template_that_cannot_be_compiled_is_refused_in_one_line_that_names_it(folder, of_base, text: str) -> None:
    (folder / adapter_dir.CHAT_TEMPLATE).write_text(text)
    with pytest.raises(ServeError, match="its chat template cannot be used: ") as raised:
        read_defaults(folder, of_base)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 800


def test_the_fields_that_are_read_are_those_that_a_training_may_set() -> None:
    assert set(_Generation.model_fields) == set(adapter_dir.GENERATION)


def test_defaults_of_sampling_have_vllms_names_and_other_fields_are_ignored(folder, of_base) -> None:
    content = {"temperature": 0, "top_p": 0.5, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    others = {
        "max_new_tokens": 7,
        "eos_token_id": [90, 3, 90],
        "do_sample": True,
        "transformers_version": "5",
        "x": None,
    }
    write(folder, "generation_config.json", {**content, **others, "presence_penalty": None})
    defaults, _ = read_defaults(folder, of_base)
    assert defaults == Defaults(None, {**content, "max_tokens": 7}, (90, 3))
    write(folder, "generation_config.json", {"eos_token_id": 5})
    assert read_defaults(folder, of_base)[0] == Defaults(None, {}, (5,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", float("nan")),
        ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("top_k", 2**31),
        ("min_p", -1), ("repetition_penalty", 0), ("repetition_penalty", float("inf")), ("presence_penalty", 3),
        ("frequency_penalty", -3), ("max_new_tokens", 0), ("max_new_tokens", "7"), ("eos_token_id", "7"),
        ("eos_token_id", [1, "2"]), ("eos_token_id", ROWS), ("eos_token_id", -1), ("eos_token_id", list(range(17))),
    ],
)  # fmt: skip
def test_a_default_of_another_type_or_range_is_refused_in_one_line(folder, of_base, name: str, value: Any) -> None:
    write(folder, "generation_config.json", {name: value})
    with pytest.raises(ServeError, match=rf"generation_config\.json has {name}=") as raised:
        read_defaults(folder, of_base)
    assert "\n" not in str(raised.value)


def test_an_added_token_without_a_row_in_the_bases_embedding_is_refused_by_its_name(folder, of_base) -> None:
    write(folder, "added_tokens.json", {"<tool>": ROWS, "<end>": 90})
    with pytest.raises(ServeError, match=r"its tokenizer adds '<tool>' \(100\), and the base's embedding has 100 rows"):
        read_defaults(folder, of_base)


def test_other_added_tokens_are_noted_unless_the_base_has_them(folder, of_base) -> None:
    write(folder, "added_tokens.json", {"<end>": 90, "t3": 3})
    assert read_defaults(folder, of_base) == (Defaults(), [])
    write(folder, "added_tokens.json", {"<end>": 91, "<think>": 95})
    notes = ["its tokenizer adds '<end>' (91), '<think>' (95), which the base's does not have: not used"]
    assert read_defaults(folder, of_base) == (Defaults(), notes)


def test_admission_returns_the_defaults_and_notes(write_lora, base: Base) -> None:
    lora = write_lora("lora")
    write(lora, "generation_config.json", {"top_k": 3})
    write(lora, "added_tokens.json", {"<new>": 5})
    admitted = base.check(lora)
    assert isinstance(admitted, Admitted)
    assert admitted.defaults == Defaults(None, {"top_k": 3})
    assert admitted.notes() == ["its tokenizer adds '<new>' (5), which the base's does not have: not used"]
    write(lora, "added_tokens.json", {"<new>": 10**6})
    with pytest.raises(ServeError, match="'<new>'"):
        base.check(lora)
