"""Layers that are made when they are asked for: an adapter of any size costs the memory of one layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Shape(NamedTuple):
    """A layer's weight is (d_out, d_in), its factors are (rank, d_in) and (d_out, rank)."""

    d_out: int
    d_in: int
    rank: int


class Layers(Mapping[str, T], Generic[T]):
    """A mapping from `names`, in their order, to what `make` returns for each; nothing is kept."""

    def __init__(self, names: Sequence[str], make: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
