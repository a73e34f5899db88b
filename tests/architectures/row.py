"""One row of the result: what an architecture can do, and the reason for each thing that it cannot."""

from dataclasses import asdict, dataclass
from typing import Any

YES = "yes"


class Failed(Exception):
    """A step that an architecture does not pass; the text is the reason."""


@dataclass(frozen=True)
class Row:
    """Each cell is "yes" or "no: REASON"; `figures` are measured numbers, which machines may differ in."""

    architecture: str
    kind: str
    all_layers: str  # whether every layer with weights of the language model is adapted, except embeddings and heads
    trained: str  # by all methods
    peft: str
    engine: str
    figures: dict[str, float]

    @property
    def cells(self) -> dict[str, str]:
        """Return the cells that must stay as they are."""
        return {name: value for name, value in asdict(self).items() if name != "figures"}


def no(reason: Any) -> str:
    """Return the cell for a step that fails for `reason`, in one line."""
    return f"no: {' '.join(str(reason).split())}"
