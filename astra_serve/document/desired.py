"""The desired state: one readable document that says which adapters are served, and from where.

    adapters:
      - name: support                       # the `model` of requests; with a namespace: team/support
        source: ./support-lora              # a folder, hf://org/repo@revision, s3://bucket/key, sha256:... in the store
        digest: sha256:3f2a...              # optional: refuse any other content
        required: true                      # a server that starts is not ready without it
        pin: true                           # never evicted from the engine's memory
        allow_no_effect: true               # served even if it changes no answer
        previous:                           # the rollback history, newest first; at most 8
          - {digest: sha256:91bc..., source: ./support-lora-v1, replaced: 2026-11-27T09:00:00Z}
          - sha256:8ad1...                  # as documents were written before sources were kept
        canary: {version: ./support-lora-v3, digest: sha256:77d0..., weight: 0.1}

The admin API and the CLI edit this document; every server follows it, now and after a restart.
"""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field, PrivateAttr, StringConstraints, ValidationError

from astra_serve.document import yaml_text
from astra_serve.document.strict import Place, Strict, content_of, dumped, first_fault, plain, replaced
from astra_serve.errors import BadDocument

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
NAME = rf"{_PART}(/{_PART})?"
NAME_IN_WORDS = (
    "use up to 128 letters, digits, '.', '_' and '-', a letter or digit first; with a namespace before it, team/adapter"
)
MAX_SOURCE = yaml_text.MAX_SCALAR
DIGEST = r"sha256:[0-9a-f]{64}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
Digest = Annotated[str, StringConstraints(pattern=f"^{DIGEST}$")]
_IN_WORDS = {
    f"^{NAME}$": NAME_IN_WORDS,
    f"^{DIGEST}$": "a digest is sha256: and 64 hexadecimal digits",
}


class Canary(Strict):
    """A version that gets a share of an adapter's requests."""

    version: str = Field(
        min_length=1, max_length=MAX_SOURCE, description="its source, as in `source`; sha256:... for one of the store"
    )
    digest: Digest | None = Field(default=None, description="the only content that is served as the canary")
    weight: float = Field(gt=0, lt=1, description="share of the requests, by a hash of the caller")


class Step(Strict):
    """A version that a rollback can go back to."""

    digest: Digest = Field(description="its content")
    source: str | None = Field(
        default=None, min_length=1, max_length=MAX_SOURCE, description="where servers without it fetch it"
    )
    replaced: datetime | None = Field(default=None, description="when another version took its place")


class Adapter(Strict):
    """One adapter that is to be served."""

    name: Name = Field(description="the `model` of requests: NAME, or NAMESPACE/NAME")
    source: str = Field(
        min_length=1,
        max_length=MAX_SOURCE,
        description="a folder, hf://org/repo@revision, any fsspec URL, or sha256:...",
    )
    digest: Digest | None = Field(default=None, description="the only content that is served under this name")
    required: bool = Field(default=False, description="a server that starts is not ready without it")
    pin: bool = Field(default=False, description="never evicted from the engine's memory")
    allow_no_effect: bool = Field(default=False, description="served even if it changes none of the base's answers")
    previous: list[Step | Digest] = Field(
        default_factory=list, description="versions to roll back to, newest first; a digest alone has no known source"
    )
    canary: Canary | None = Field(default=None, description="a version that gets a share of the requests")

    @property
    def steps(self) -> list[Step]:
        """Return `previous`, each as a step."""
        return [step if isinstance(step, Step) else Step(digest=step) for step in self.previous]


class Document(Strict):
    """Which adapters are served."""

    adapters: list[Adapter] = Field(default_factory=list, description="in any order")
    _by_name: dict[str, Adapter] = PrivateAttr(default_factory=dict)

    def model_post_init(self, _: Any) -> None:
        """Raise ValueError when two adapters have one name."""
        for adapter in self.adapters:
            if self._by_name.setdefault(adapter.name, adapter) is not adapter:
                raise ValueError(f"two adapters are named {adapter.name!r}")

    def get(self, name: str) -> Adapter | None:
        """Return the adapter `name`, or None."""
        return self._by_name.get(name)

    def sharing(self, before: "Document") -> "Document":
        """Return the document with the objects of `before` for the entries that are equal: comparing them is fast."""
        shared = [was if (was := before.get(one.name)) == one else one for one in self.adapters]
        return Document(adapters=[one for one in shared if one])

    def replacing(self, name: str, old: Adapter | None, new: Adapter | None) -> "Document":
        """Return the document with the entry `new` in place of `old`; None stands for no entry.

        Raises Conflict where the document has an entry of this name that is neither.
        """
        return Document(adapters=replaced(self.adapters, name, old, new))


def parse(text: str, origin: str) -> Document:
    """Return the document in `text`, YAML or JSON; an empty text serves no adapters, as a file that is not there yet.

    Raises BadDocument with `origin` and the fault in one line.
    """
    if not text.strip():
        return Document()
    content = content_of(text, origin)
    if content is None or content == {}:
        raise BadDocument(f"{origin} has no 'adapters': write 'adapters: []' to serve none")
    try:
        return _document(content)
    except BadDocument as error:
        raise BadDocument(f"{origin}: {error}") from error


def _document(content: Any) -> Document:
    try:
        if not isinstance(content, dict) or set(content) != {"adapters"} or not isinstance(content["adapters"], list):
            return Document.model_validate(content)
        # One by one: pydantic lets no other thread run while it validates thousands of entries.
        return Document(adapters=[_entry(found, number) for number, found in enumerate(content["adapters"])])
    except ValidationError as error:
        raise BadDocument(_first(error)) from error


def _entry(content: Any, number: int) -> Adapter:
    try:
        return Adapter.model_validate(content)
    except ValidationError as error:
        raise BadDocument(_first(error, ("adapters", number))) from error


def entry(content: dict[str, Any]) -> Adapter:
    """Return an adapter's entry. Raises BadDocument with the fault in one line."""
    try:
        return Adapter.model_validate(content)
    except ValidationError as error:
        raise BadDocument(f"{content.get('name', 'an adapter')!r}: {_first(error)}") from error


def dump(content: Document | dict[str, Any]) -> str:
    """Return a document, or the keys of an entry, as YAML in block style."""
    if isinstance(content, Document):
        content = plain(content) or {"adapters": []}
    return dumped(content)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the document."""
    return Document.model_json_schema()


def _first(error: ValidationError, place: Place = ()) -> str:
    return first_fault(error, _model_at, _IN_WORDS, place)


def _model_at(place: Place) -> type[BaseModel]:
    return Document if not place else Canary if "canary" in place else Step if "previous" in place else Adapter
