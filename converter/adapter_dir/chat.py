"""The files of an adapter beside its weights that say how it is asked: its chat template, defaults and added tokens.

    chat_template.jinja      the chat template; without it, the one in tokenizer_config.json, as transformers reads them
    tokenizer_config.json    the special tokens that a template may write (`bos_token`), and added tokens
    generation_config.json   defaults of sampling, and tokens that end an answer
    added_tokens.json, tokenizer.json    added tokens

Trainers save a tokenizer beside each adapter. A server tokenises with the base's tokenizer alone.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.adapter_dir.errors import MalformedAdapter
from converter.adapter_dir.folder import MAX_JSON_BYTES, file_in, read_json

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER = "tokenizer.json"
MAX_TEMPLATE_BYTES = 2**20
# The files with the most bytes of each, in the order of a version's digest. Tokenizers of 256,000 tokens have 33 MiB.
CHAT_FILES = {
    CHAT_TEMPLATE: MAX_TEMPLATE_BYTES,
    GENERATION_CONFIG: 2**20,
    TOKENIZER_CONFIG: MAX_JSON_BYTES,
    ADDED_TOKENS: MAX_JSON_BYTES,
    TOKENIZER: 2**26,
}
# The fields of generation_config.json that servers read.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
GENERATION = (*SAMPLING, "max_new_tokens", "eos_token_id")
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of templates: for all requests, and for those with tools
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template by its names (`DEFAULT`, `WITH_TOOLS`), and the special tokens of its tokenizer by theirs."""

    texts: Mapping[str, str]
    special_tokens: Mapping[str, str]

    def same_as(self, other: "ChatTemplate | None") -> bool:
        """Return whether it renders what `other` does: the same texts, and the same special tokens in them."""
        if other is None or self.texts != other.texts:
            return False
        written = {
            name: token for name, token in self.special_tokens.items() if any(name in t for t in self.texts.values())
        }
        return written.items() <= other.special_tokens.items()


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a folder, None where it has none. Raises MalformedAdapter and UnsafeAdapter."""
    config = _optional(folder, TOKENIZER_CONFIG)
    found = config.get("chat_template")
    if os.path.lexists(folder / CHAT_TEMPLATE):
        found = _text(folder)
    if found is None:
        return None
    where = f"{folder}: the chat template"
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = {name: text for name, text in named.items() if name in (DEFAULT, WITH_TOOLS)}
        if DEFAULT not in found:
            raise MalformedAdapter(f"{where} in {TOKENIZER_CONFIG} has names, and none is {DEFAULT!r}: name one so")
    texts = found if isinstance(found, dict) else {DEFAULT: found}
    if not all(isinstance(text, str) for text in texts.values()):
        raise MalformedAdapter(f"{where} in {TOKENIZER_CONFIG} is no text, and no list of names and texts")
    if sum(len(text.encode(errors="replace")) for text in texts.values()) > MAX_TEMPLATE_BYTES:
        raise MalformedAdapter(f"{where} has more than {MAX_TEMPLATE_BYTES >> 20} MiB, the limit for it")
    special = {name: _content(config.get(name)) for name in _SPECIAL}
    return ChatTemplate(texts, {name: token for name, token in special.items() if token is not None})


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of generation_config.json, empty without it. Raises MalformedAdapter and UnsafeAdapter."""
    return _optional(folder, GENERATION_CONFIG)


def read_added_tokens(folder: Path) -> dict[int, str]:
    """Return the tokens that were added to the vocabulary of a folder's tokenizer, by their ids.

    Raises MalformedAdapter and UnsafeAdapter.
    """
    found: list[tuple[Any, Any]] = [(number, token) for token, number in _optional(folder, ADDED_TOKENS).items()]
    decoder = _optional(folder, TOKENIZER_CONFIG).get("added_tokens_decoder")
    found += [(number, _content(token)) for number, token in decoder.items()] if isinstance(decoder, dict) else []
    listed = _optional(folder, TOKENIZER).get("added_tokens")
    for one in listed if isinstance(listed, list) else ():
        found.append((one.get("id"), one.get("content")) if isinstance(one, dict) else (None, None))
    tokens = {}
    for number, token in found:
        if isinstance(number, str) and number.isdecimal() and len(number) < 10:
            number = int(number)  # the keys of a decoder
        if type(number) is not int or not isinstance(token, str) or number < 0:
            raise MalformedAdapter(
                f"{folder}: an added token of its tokenizer has no id or no text: remove those files"
            )
        tokens[number] = token
    return tokens


def copy_chat_files(folder: Path, out: Path) -> None:
    """Copy the files of `CHAT_FILES` that `folder` has to `out`. Raises NotAnAdapter, UnsafeAdapter and OSError."""
    for name in CHAT_FILES:
        if os.path.lexists(folder / name):
            shutil.copyfile(file_in(folder, name), out / name)


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name, CHAT_FILES[name]) if os.path.lexists(folder / name) else {}


def _text(folder: Path) -> str:
    file = file_in(folder, CHAT_TEMPLATE)
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise MalformedAdapter(f"{file} is larger than {MAX_TEMPLATE_BYTES >> 20} MiB, the limit for it")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MalformedAdapter(f"{file} is not in UTF-8: {error.reason}") from error
    except OSError as error:
        raise MalformedAdapter(f"{file} cannot be read: {error.strerror}") from error


def _content(token: Any) -> str | None:
    """Return the text of a token, which may be an object with its text as `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
