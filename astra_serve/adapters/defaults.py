"""Settings of an adapter for the requests that name it: a chat template, defaults of sampling, and stop tokens.

Each is optional; without it the base's is used. A template is used where it differs from the base's: then prompts of
chats are rendered by `templates`. The defaults are those that vLLM reads of a base's generation_config.json; what a
request sets itself counts. Added tokens are checked alone: the server tokenises with the base's tokenizer.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer

from astra_serve.adapters.templates import content_format
from astra_serve.errors import ServeError, TemplateFailed
from converter import adapter_dir
from converter.adapter_dir import DEFAULT, GENERATION_CONFIG, WITH_TOOLS, AdapterError, ChatTemplate

MOST_STOP_TOKENS = 16  # vLLM's samplers take 128 of a request, an adapter and the base together
SHOWN = 8  # names in a line


@dataclass(frozen=True)
class OwnTemplate:
    """A chat template that differs from the base's, with the format of contents that each of its texts takes."""

    template: ChatTemplate
    formats: Mapping[str, str]

    def chosen(self, *, with_tools: bool) -> tuple[str, str]:
        """Return the text for a request, and its format: "string" or "openai" (parts)."""
        name = WITH_TOOLS if with_tools and WITH_TOOLS in self.template.texts else DEFAULT
        return self.template.texts[name], self.formats[name]


@dataclass(frozen=True)
class Defaults:
    """An adapter's own settings of requests; empty where it has none."""

    template: OwnTemplate | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)  # by vLLM's names
    stop_tokens: tuple[int, ...] = ()  # beside the base's


class BaseTokenizer:
    """The tokenizer of a base as far as an adapter's files are compared with it; read when it is needed."""

    def __init__(self, folder: Path, *, as_served: bool = True) -> None:
        """`as_served` is False where the server renders the base's chats with another template than its folder's."""
        self._folder, self._as_served = folder, as_served

    @cached_property
    def template(self) -> ChatTemplate | None:
        """Return the chat template of requests for the base, if it is known."""
        with suppress(AdapterError):  # the engine says what is wrong with its files
            return adapter_dir.read_chat_template(self._folder) if self._as_served else None
        return None

    @cached_property
    def rows(self) -> int | None:
        """Return the number of rows of the base's embedding, if its config says so."""
        return adapter_dir.vocabulary_size(self._folder)

    def unknown(self, tokens: Mapping[int, str]) -> dict[int, str]:
        """Return those of `tokens` that the tokenizer does not have with the same id."""
        return {number: token for number, token in tokens.items() if self._ids(token) != number}

    def _ids(self, token: str) -> int | None:
        return None if self._vocabulary is None else self._vocabulary.token_to_id(token)

    @cached_property
    def _vocabulary(self) -> Tokenizer | None:
        with suppress(Exception):  # `tokenizers` raises a plain one, also where there is no such file
            return Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        return None


Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Generation(BaseModel):
    """The fields of generation_config.json that vLLM reads, with the ranges of its own parameters."""

    model_config = ConfigDict(strict=True, extra="ignore")

    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    eos_token_id: int | Annotated[list[int], Field(max_length=MOST_STOP_TOKENS)] | None = None


def read_defaults(folder: Path, base: BaseTokenizer) -> tuple[Defaults, list[str]]:
    """Return the defaults of the adapter in `folder`, and what an operator should know of them, a line each.

    A template of its own is compiled. Raises ServeError and AdapterError.
    """
    sampling, stop_tokens = _generation(folder, base)
    notes = _check_added_tokens(folder, base)
    template = adapter_dir.read_chat_template(folder)
    if template is None:
        return Defaults(None, sampling, stop_tokens), notes
    if template.same_as(base.template):
        return Defaults(None, sampling, stop_tokens), [*notes, "its chat template is the base's"]
    try:
        formats = {name: content_format(text) for name, text in template.texts.items()}
    except TemplateFailed as error:
        raise ServeError(f"{folder}: its chat template cannot be used: {error}") from error
    return Defaults(OwnTemplate(template, formats), sampling, stop_tokens), notes


def _generation(folder: Path, base: BaseTokenizer) -> tuple[dict[str, float], tuple[int, ...]]:
    """Return the defaults of sampling by vLLM's names, and the stop tokens."""
    content = adapter_dir.read_generation_config(folder)
    where = f"{folder / GENERATION_CONFIG}"
    try:
        found = _Generation.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        name, reason = str(fault["loc"][0]), fault["msg"]
        raise ServeError(f"{where} has {name}={_short(content[name])}: {reason[0].lower()}{reason[1:]}") from error
    sampling: dict[str, Any] = found.model_dump(exclude_none=True)
    stops = sampling.pop("eos_token_id", [])
    stops = [stops] if isinstance(stops, int) else stops
    if "max_new_tokens" in sampling:
        sampling["max_tokens"] = sampling.pop("max_new_tokens")
    rows = base.rows or 2**31
    if wrong := [token for token in stops if not 0 <= token < rows]:
        raise ServeError(f"{where} has eos_token_id={_short(wrong[0])}: the base has the tokens 0 to {rows - 1}")
    return sampling, tuple(dict.fromkeys(stops))


def _check_added_tokens(folder: Path, base: BaseTokenizer) -> list[str]:
    """Return a note of added tokens that the base's tokenizer does not have.

    Raises ServeError where the base's embedding has no row for one of them.
    """
    added = base.unknown(adapter_dir.read_added_tokens(folder))
    beyond = {number: token for number, token in added.items() if base.rows is not None and number >= base.rows}
    if beyond:
        raise ServeError(
            f"{folder}: its tokenizer adds {_named(beyond)}, and the base's embedding has {base.rows} rows: train it "
            "without new tokens, or without a larger embedding"
        )
    return [f"its tokenizer adds {_named(added)}, which the base's does not have: not used"] if added else []


def _named(tokens: Mapping[int, str]) -> str:
    shown = ", ".join(f"{_short(token)} ({number})" for number, token in sorted(tokens.items())[:SHOWN])
    return shown if len(tokens) <= SHOWN else f"{shown} and {len(tokens) - SHOWN} others"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
