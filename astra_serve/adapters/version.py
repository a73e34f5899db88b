"""An adapter's immutable version, and the alias: the public name that points at versions."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Version:
    """The content `digest` (sha256:HEX) of an adapter, under the name that it serves."""

    alias: str
    digest: str

    @property
    def name(self) -> str:
        """Return the name that answers carry and that requests may ask for: NAME@ and 12 hexadecimal digits."""
        return f"{self.alias}@{self.digest.removeprefix('sha256:')[:12]}"


@dataclass(frozen=True)
class Alias:
    """What a public name points at; replaced as a whole, in one assignment."""

    current: Version
    previous: tuple[Version, ...] = ()  # the versions that a rollback can reach, newest first
    canary: Version | None = None
    weight: float = 0.0  # the canary's share of the users, and of the requests without one
    pinned: bool = False  # current and canary are never evicted
    source: str | None = None  # of `current`; None where only the store has it
    lasting: bool = True  # False: a policy of a trainer, which is in no document and no history

    def serving(self) -> Iterator[Version]:
        """Yield the versions that requests for the bare name reach."""
        yield self.current
        if self.canary:
            yield self.canary

    def versions(self) -> Iterator[Version]:
        """Yield every version that a request may name."""
        yield from self.serving()
        yield from self.previous
