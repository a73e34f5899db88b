"""Usage as sums: of requests and tokens, by day, tenant, adapter and version; and questions about them.

A day is one of UTC, that in which a request ends. A limited request (429) is no error; every other 4xx, a 5xx and a
broken stream are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from difflib import get_close_matches
from operator import add
from typing import NamedTuple, TypeVar

from astra_serve.errors import BadQuery
from astra_serve.gateway.request import Request

DAYS = 31  # of a question without its first day
Columns = TypeVar("Columns", bound=tuple[str, ...])
PARAMETERS = ("from", "to", "tenant", "adapter", "by", "format")


class Key(NamedTuple):
    """The subject of a sum; `version` is empty for the base, and for requests that no version has served."""

    day: str  # as 2026-11-28
    tenant: str
    adapter: str
    version: str


class Numbers(NamedTuple):
    """What is summed up. `prompt_tokens` includes `cached_tokens`, which the engine found in its prefix cache."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    errors: int = 0
    limited: int = 0

    def plus(self, other: Iterable[int]) -> "Numbers":
        """Return the sum of both."""
        return Numbers(*map(add, self, other))


Sums = dict[Key, Numbers]
Table = dict[tuple[str, ...], Numbers]  # by some of the columns of Key


def add_to(table: dict[Columns, Numbers], key: Columns, numbers: Iterable[int]) -> None:
    """Add `numbers` to those of `key`."""
    table[key] = table.get(key, Numbers()).plus(numbers)


def numbers_of(request: Request) -> Numbers:
    """Return what a request that has ended adds to its sums."""
    limited = request.status == 429
    error = request.outcome in ("client_error", "server_error") and not limited
    tokens = request.prompt_tokens, request.cached_tokens, request.output_tokens
    return Numbers(1, *tokens, int(error), int(limited))


def day_of(seconds: float) -> str:
    """Return the day of UTC of a time in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


@dataclass(frozen=True)
class Question:
    """Which sums are wanted: days (both ends included), a tenant and an adapter, and the columns of each row."""

    first_day: date
    last_day: date
    tenant: str | None = None
    adapter: str | None = None
    by: tuple[str, ...] = Key._fields

    def matches(self, key: Key) -> bool:
        """Return whether a sum is part of the answer."""
        return (
            str(self.first_day) <= key.day <= str(self.last_day)
            and self.tenant in (None, key.tenant)
            and self.adapter in (None, key.adapter)
        )

    def row_of(self, key: Key) -> tuple[str, ...]:
        """Return the row that a sum belongs to."""
        return tuple(getattr(key, column) for column in self.by)


def question(given: Mapping[str, str], today: date) -> Question:
    """Return the question of a request's parameters. Raises BadQuery with the parameter and its fault."""
    for name in given:
        if name not in PARAMETERS:
            near = get_close_matches(name, PARAMETERS, 1)
            known = f"did you mean {near[0]}?" if near else f"there are: {', '.join(PARAMETERS)}"
            raise BadQuery(f"there is no parameter {name[:64]!r}: {known}", name[:64])
    last = _date(given, "to", lambda: today)
    first = _date(given, "from", lambda: last - min(timedelta(DAYS - 1), last - date.min))
    if first > last:
        raise BadQuery(f"from {first} is after to {last}: give the first day as from", "from")
    columns = given.get("by", "")
    by = tuple(name for name in Key._fields if name in columns.split(",")) if columns else Key._fields
    if wrong := set(columns.split(",")) - {"", *Key._fields}:
        raise BadQuery(f"by={min(wrong)[:64]} is no column: give some of {', '.join(Key._fields)}", "by")
    return Question(first, last, given.get("tenant"), given.get("adapter"), by or Key._fields)


def _date(given: Mapping[str, str], name: str, default: Callable[[], date]) -> date:
    if name not in given:
        return default()
    try:
        if len(given[name]) == len("2026-11-28"):
            return date.fromisoformat(given[name])
    except ValueError:
        pass
    raise BadQuery(f"{name}={given[name][:64]} is no day: write it as 2026-11-28", name)
