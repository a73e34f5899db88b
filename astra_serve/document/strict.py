"""What every document has in common: unknown keys are faults, and a fault is one line."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from astra_serve.document import yaml_text
from astra_serve.errors import BadDocument, Conflict

_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
Place = tuple[str | int, ...]


class Strict(BaseModel):
    """A part of a document; it does not change, and has no other keys than its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(Protocol):
    """An entry of a document's list."""

    @property
    def name(self) -> str:
        """Return its name, which no other entry has."""


Entry = TypeVar("Entry", bound=Named)


def replaced(entries: Iterable[Entry], name: str, old: Entry | None, new: Entry | None) -> list[Entry]:
    """Return the entries with `new` in place of `old`; None stands for no entry.

    Raises Conflict where there is an entry of this name that is neither.
    """
    entries = list(entries)
    there = next((entry for entry in entries if entry.name == name), None)
    if there not in (old, new):
        raise Conflict(f"somebody else has changed {name!r} in the document meanwhile: try again")
    if there is None:
        return [*entries, *([new] if new else [])]
    return [entry for entry in (new if one is there else one for one in entries) if entry]


def plain(model: BaseModel) -> dict[str, Any]:
    """Return an entry or a document as YAML and JSON have it, without the keys that have their default."""
    return model.model_dump(mode="json", exclude_defaults=True)


def content_of(text: str, origin: str) -> Any:
    """Return what YAML or JSON in `text` says. Raises BadDocument with `origin` and the fault in one line."""
    try:
        return yaml_text.load(text)
    except yaml_text.BadYaml as error:
        raise BadDocument(f"{origin} is not YAML{error.where}: {error}") from error


def dumped(content: dict[str, Any]) -> str:
    """Return keys and values as YAML in block style."""
    return str(yaml.dump(content, Dumper=_DUMPER, sort_keys=False, width=2**20, allow_unicode=True))


def first_fault(
    error: ValidationError,
    model_at: Callable[[Place], type[BaseModel]],
    in_words: Mapping[str, str],
    place: Place = (),
) -> str:
    """Return the first fault in one line, below `place`; of an unknown key with the nearest known one.

    `model_at` returns the model at a place; `in_words` says in words what a pattern of texts allows.
    """
    fault = error.errors(include_input=False, include_url=False)[0]
    loc = (*place, *fault["loc"])
    path = [str(part) for part in loc if isinstance(part, int) or re.fullmatch("[a-z_]+", part)]
    where = ".".join(path)
    if fault["type"] == "string_pattern_mismatch":
        return f"{where}: {in_words[fault['ctx']['pattern']]}"
    if fault["type"] != "extra_forbidden":
        reason = re.sub(r"^Value error, ", "", fault["msg"])
        return f"{where}: {reason}" if where else reason
    *parents, last = loc
    known = model_at(tuple(parents)).model_fields
    near = difflib.get_close_matches(str(last), known, n=1)
    return f"{where}: no such key; " + (f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}")
