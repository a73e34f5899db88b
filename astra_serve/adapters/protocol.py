"""The interface of the engine that serves adapters: `engine.vllm` implements it, the tests have a stand-in."""

from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """An engine with one base; a `handle` is the engine's own object for an adapter that it has loaded."""

    async def load(self, name: str, folder: Path) -> Any:
        """Read an adapter and return its handle. Raises ServeError; the engine has forgotten the adapter then."""

    async def left_out(self, handle: Any) -> list[str]:
        """Return the modules of a loaded adapter that the engine does not adapt. Raises ServeError."""

    async def unload(self, handle: Any) -> None:
        """Forget an adapter, and verify that it is forgotten. Raises ServeError."""

    async def in_slots(self) -> set[str]:
        """Return the names of the adapters in the slots of the engine's batches: on its device. Raises ServeError."""

    async def next_tokens(
        self, prompts: list[list[int]], handle: Any, *, urgent: bool = False
    ) -> list[dict[int, float]]:
        """Return the log probabilities of the likeliest next tokens after each prompt; a handle of None is the base.

        Requests of users are computed first, unless one of them waits for the answer (`urgent`). Raises ServeError.
        """
