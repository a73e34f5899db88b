"""Mappings whose values are computed on access: an adapter of any size needs the memory of one layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Shape(NamedTuple):
    """The sizes of an adapted layer: its weight is (d_out, d_in), its factors are (rank, d_in) and (d_out, rank)."""

    d_out: int
    d_in: int
    rank: int


class Layers(Mapping[str, T], Generic[T]):
    """A mapping from `names`, in their order, to `compute(name)`, called at every access; nothing is cached."""

    def __init__(self, names: Sequence[str], compute: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
