"""The desired state: one readable document that says which adapters are served, and from where.

    adapters:
      - name: support                       # what requests call it
        source: ./support-lora              # a folder, hf://org/repo@revision, s3://bucket/key, sha256:... in the store
        digest: sha256:3f2a...              # optional: nothing else is served
        required: true                      # a server that starts is not ready without it
        pin: true                           # never swapped out
        allow_no_effect: true               # served even if it changes nothing
        previous: [sha256:91bc...]          # what a rollback goes back to, newest first
        canary: {version: sha256:77d0..., weight: 0.1}

The admin API edits this document; the server does what it says, now and after a restart.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from astra_serve.errors import BadDocument, Conflict
from converter.errors import first_line

# libyaml's, where PyYAML was built with it: a thousand adapters are read in 0.06 s instead of 0.3.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
MOST_PREVIOUS = 8  # versions to roll back to
DIGEST = r"sha256:[0-9a-f]{64}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Digest = Annotated[str, StringConstraints(pattern=f"^{DIGEST}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Canary(_Strict):
    """A version that gets a share of an adapter's requests."""

    version: str = Field(description="where it comes from, as `source`; sha256:... for one of the store")
    weight: float = Field(gt=0, lt=1, description="share of the requests, by a hash of the caller")


class Adapter(_Strict):
    """One adapter that is to be served."""

    name: Name = Field(description="what requests call it: letters, digits, '.', '_' and '-'")
    source: str = Field(min_length=1, description="a folder, hf://org/repo@revision, any fsspec URL, or sha256:...")
    digest: Digest | None = Field(default=None, description="the only content that is served under this name")
    required: bool = Field(default=False, description="a server that starts is not ready without it")
    pin: bool = Field(default=False, description="never swapped out of the engine")
    allow_no_effect: bool = Field(default=False, description="served even if it changes none of the base's answers")
    previous: list[Digest] = Field(default_factory=list, description="versions to roll back to, newest first")
    canary: Canary | None = Field(default=None, description="a version that gets a share of the requests")


class Document(_Strict):
    """Which adapters are served."""

    adapters: list[Adapter] = Field(default_factory=list, description="in any order")

    @model_validator(mode="after")
    def _names_differ(self) -> "Document":
        names = [adapter.name for adapter in self.adapters]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two adapters are named {twice!r}")
        return self

    def get(self, name: str) -> Adapter | None:
        """Return the adapter `name`; None where there is none."""
        return next((adapter for adapter in self.adapters if adapter.name == name), None)

    def with_adapter(self, adapter: Adapter) -> "Document":
        """Return the document with `adapter` in the place of the one of its name, or at the end."""
        rest = [adapter if old.name == adapter.name else old for old in self.adapters]
        return Document(adapters=rest if self.get(adapter.name) else [*rest, adapter])

    def replacing(self, name: str, old: Adapter | None, new: Adapter | None) -> "Document":
        """Return the document with `new` for `old`; None is no entry. Raises Conflict where it says neither."""
        if self.get(name) not in (old, new):
            raise Conflict(f"somebody else has changed {name!r} in the document meanwhile: try again")
        return self.with_adapter(new) if new else self.without(name)

    def without(self, name: str) -> "Document":
        """Return the document without the adapter `name`."""
        return Document(adapters=[adapter for adapter in self.adapters if adapter.name != name])


def parse(text: str, origin: str) -> Document:
    """Return the document in `text`, YAML or JSON. Raises BadDocument with `origin` and the fault in one line."""
    try:
        content = yaml.load(text, _LOADER)  # noqa: S506 (a safe one)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        fault = getattr(error, "problem", None) or first_line(error)
        raise BadDocument(f"{origin} is not YAML{where}: {fault}") from error
    try:
        return Document.model_validate({} if content is None else content)
    except ValidationError as error:
        raise BadDocument(f"{origin}: {_first(error)}") from error


def entry(content: dict[str, Any]) -> Adapter:
    """Return an adapter's entry. Raises BadDocument with the fault in one line."""
    try:
        return Adapter.model_validate(content)
    except ValidationError as error:
        raise BadDocument(f"{content.get('name', 'an adapter')!r}: {_first(error)}") from error


def previous(digests: Iterable[str | None], current: str) -> list[str]:
    """Return which of `digests`, newest first, an entry that now means `current` may go back to."""
    return [one for one in dict.fromkeys(digests) if one and one != current][:MOST_PREVIOUS]


def dump(document: Document) -> str:
    """Return the document as YAML, without what is as it is by default."""
    return str(
        yaml.dump(document.model_dump(exclude_defaults=True) or {"adapters": []}, Dumper=_DUMPER, sort_keys=False)
    )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the document."""
    return Document.model_json_schema()


def _first(error: ValidationError) -> str:
    """Return the first fault in one line; of an unknown key with the nearest known one."""
    fault = error.errors()[0]
    *path, last = fault["loc"] or ("document",)
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] != "extra_forbidden":
        return f"{where}: {re.sub(r'^Value error, ', '', fault['msg'])}" if where else str(fault["msg"])
    model = {True: Canary, False: Adapter if path else Document}["canary" in path]
    near = difflib.get_close_matches(str(last), model.model_fields, n=1)
    return f"{where}: no such key; " + (
        f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(model.model_fields)}"
    )
