"""The answers of an admin port: the state of its adapters, typed. Keys that a newer server adds are left out."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Probe:
    """The result of a version's probe; mean absolute differences of log probabilities, in nats."""

    recorded: bool  # whether the adapter has a record of its answers
    prompts: int
    effect: float  # between the engine's answers with the adapter and those of the base
    deviation: float | None  # between the engine's answers with the adapter and the record


@dataclass(frozen=True)
class VersionState:
    """A version on one server."""

    name: str  # NAME@ and 12 hexadecimal digits, as answers carry it
    digest: str
    source: str | None
    residency: str  # slot, memory, disk or absent
    requests: int  # that use it now
    failed: str | None
    probe: Probe | None  # None: not proved in this process


@dataclass(frozen=True)
class CanaryState(VersionState):
    """A version that gets a share of an adapter's requests."""

    weight: float
    share: float | None  # of the requests since it began; None before any


@dataclass(frozen=True)
class Publishing:
    """A version that is being prepared."""

    source: str
    state: str


@dataclass(frozen=True)
class AdapterState:
    """An adapter on one server: its entry in the document, and the versions that its name points at."""

    name: str
    state: str  # of its entry: pending, fetching, verifying, waiting, loading, probing, serving or failed
    reason: str | None  # of a failure
    since: float  # seconds since 1970
    seconds: dict[str, float]  # the duration of each phase before this one
    source: str
    required: bool
    pin: bool
    publishing: Publishing | None
    version: VersionState | None  # that serves; None before the first
    canary: CanaryState | None
    previous: tuple[VersionState, ...]  # that a rollback can reach, newest first

    @property
    def settled(self) -> bool:
        """Return whether its entry is served, or has failed."""
        return self.state in ("serving", "failed")


@dataclass(frozen=True)
class DocumentState:
    """The document as one server follows it."""

    where: str
    digest: str | None  # of the text that is followed; None before it was read
    fault: str | None  # why the present text is not followed


@dataclass(frozen=True)
class AdapterList:
    """All adapters of one server, and its document. Iterating over it yields the adapters."""

    adapters: tuple[AdapterState, ...]
    document: DocumentState

    def __iter__(self) -> Iterator[AdapterState]:
        return iter(self.adapters)


@dataclass(frozen=True)
class Removed:
    """An adapter that is not served any more."""

    name: str
    state: str


@dataclass(frozen=True)
class Event:
    """Something happened to an adapter, or to a version of it."""

    adapter: str
    event: str
    version: str | None
    reason: str | None
    seconds: dict[str, float]  # the duration of the steps that led to it
    total: float | None  # of a version that serves now: seconds from the change to the flip, with all waits
    time: float  # seconds since 1970


@dataclass(frozen=True)
class EventList:
    """The newest events, oldest first. Iterating over it yields them."""

    events: tuple[Event, ...]

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


@dataclass(frozen=True)
class Rotation:
    """Whether a server was taken out of rotation, and how many requests it runs."""

    drained: bool
    running: int


@dataclass(frozen=True)
class UsageNumbers:
    """Sums over requests that have ended. `prompt_tokens` includes `cached_tokens`, found in the prefix cache."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    errors: int  # 4xx, 5xx and broken streams
    limited: int  # refused by a limit of the tenant (429), and no errors


@dataclass(frozen=True)
class UsageRow(UsageNumbers):
    """The usage of a day, tenant, adapter and version; one that the rows are not divided by is None."""

    day: str | None = None  # of UTC, as 2026-11-28
    tenant: str | None = None  # _all: keys of --api-key, and servers without keys
    adapter: str | None = None  # _unknown: no such model; _other: policies of trainers
    version: str | None = None  # empty for the base


@dataclass(frozen=True)
class Usage:
    """The usage of some days, both ends included. Iterating over it yields the rows."""

    first_day: str
    last_day: str
    by: tuple[str, ...]
    rows: tuple[UsageRow, ...]
    total: UsageNumbers
    fault: str | None  # why the sums are in the server's memory alone

    def __iter__(self) -> Iterator[UsageRow]:
        return iter(self.rows)


def read(kind: type[Answer], content: Any) -> Answer:
    """Return an answer's JSON as `kind`. Raises ValueError where a field is absent, or of another type."""
    found: Answer = _reader(cast(Hashable, kind)).validate_python(content)
    return found


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
