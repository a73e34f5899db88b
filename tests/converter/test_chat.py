"""The chat template, defaults of generation and added tokens of an adapter's folder, as transformers has them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from converter.adapter_dir import (
    ChatTemplate,
    MalformedAdapter,
    UnsafeAdapter,
    read_added_tokens,
    read_chat_template,
    read_generation_config,
)


def write(folder: Path, **files: Any) -> Path:
    """Write each file whose name, without the end, is a keyword: a text as .jinja, anything else as .json."""
    for name, content in files.items():
        text = isinstance(content, str)
        (folder / f"{name}.{'jinja' if text else 'json'}").write_text(content if text else json.dumps(content))
    return folder


def test_a_tokenizer_that_transformers_saves_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")))
    tokenizer.eos_token = "</s>"  # noqa: S105 (a token of text)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = "{{ messages }}\n"
    for several, jinja in ((False, True), (False, False), (True, False)):
        if several:
            tokenizer.chat_template = {"default": "{{ messages }}\n", "tool_use": "{{ tools }}"}
        folder = tmp_path / f"{several}{jinja}"
        tokenizer.save_pretrained(folder, save_jinja_files=jinja)
        found = read_chat_template(folder)
        assert found is not None
        assert found.texts["default"] == "{{ messages }}\n"
        assert found.texts.get("tool_use") == ("{{ tools }}" if several else None)
        assert found.special_tokens == {"eos_token": "</s>"}
        assert read_added_tokens(folder)[2] == "<new>"


def test_the_file_of_a_template_counts_before_the_one_in_the_config(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    config = {"chat_template": "old", "bos_token": {"content": "<s>"}, "eos_token": None}
    write(tmp_path, tokenizer_config=config)
    assert read_chat_template(tmp_path) == ChatTemplate({"default": "old"}, {"bos_token": "<s>"})
    write(tmp_path, chat_template="new")
    assert read_chat_template(tmp_path) == ChatTemplate({"default": "new"}, {"bos_token": "<s>"})


def test_a_template_is_the_same_as_another_where_no_special_token_that_it_writes_differs() -> None:
    text = "{{ eos_token }}"
    base = ChatTemplate({"default": text}, {"eos_token": "</s>", "pad_token": "<pad>"})
    assert ChatTemplate({"default": text}, {"eos_token": "</s>", "pad_token": "</s>"}).same_as(base)
    assert not ChatTemplate({"default": text}, {"eos_token": "<end>"}).same_as(base)
    assert not ChatTemplate({"default": "y"}, {}).same_as(base)
    assert not base.same_as(None)


def test_added_tokens_are_in_three_files(tmp_path: Path) -> None:
    assert read_added_tokens(tmp_path) == {}
    write(tmp_path, added_tokens={"<a>": 7}, tokenizer={"added_tokens": [{"id": 8, "content": "<b>"}]})
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {"9": {"content": "<c>"}}})
    assert read_added_tokens(tmp_path) == {7: "<a>", 8: "<b>", 9: "<c>"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer_config": {"chat_template": [{"name": "rag", "template": "x"}]}}, "none is 'default'"),
        ({"tokenizer_config": {"chat_template": 3}}, "is no text"),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": 3}]}}, "is no text"),
        ({"tokenizer_config": {"chat_template": "x" * (2**20 + 1)}}, "more than 1 MiB"),
        ({"tokenizer_config": []}, "is not a JSON object"),
        ({"chat_template": "x" * (2**20 + 1)}, "larger than 1 MiB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_template_that_is_none_is_refused_in_one_line(tmp_path: Path, files: Any, reason: str) -> None:
    with pytest.raises(MalformedAdapter, match=reason) as raised:
        read_chat_template(write(tmp_path, **files))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("listed", [[3], [{"id": "x", "content": "a"}], [{"id": -1, "content": "a"}], [{"id": 1}]])
def test_an_added_token_without_id_or_text_is_refused(tmp_path: Path, listed: Any) -> None:
    with pytest.raises(MalformedAdapter, match="no id or no text"):
        read_added_tokens(write(tmp_path, tokenizer={"added_tokens": listed}))


def test_a_template_that_is_not_text_or_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(MalformedAdapter, match="not in UTF-8"):
        read_chat_template(tmp_path)
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(UnsafeAdapter):
        read_chat_template(tmp_path)


def test_a_generation_config_is_read_and_may_be_absent(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    assert read_generation_config(write(tmp_path, generation_config={"top_k": 3})) == {"top_k": 3}
