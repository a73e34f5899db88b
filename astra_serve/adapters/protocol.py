"""What the fleet asks of an engine; `engine` is the one that does it, tests have a stand-in."""

from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """What is asked of the engine; `handle` is whatever it needs to know an adapter by."""

    async def load(self, name: str, folder: Path) -> Any:
        """Read an adapter and return its handle. Raises ServeError."""

    async def unload(self, handle: Any) -> None:
        """Forget an adapter, and make sure that it is forgotten. Raises ServeError."""

    async def in_slots(self) -> set[str]:
        """Return the names of the adapters that have a slot in the engine's batches: the device's memory."""

    async def next_tokens(
        self, prompts: list[list[int]], handle: Any, *, urgent: bool = False
    ) -> list[dict[int, float]]:
        """Return the log probabilities of the likeliest next tokens after each prompt; a handle of None is the base.

        Requests of users come first, unless one of them waits for the answer (`urgent`). Raises ServeError.
        """
