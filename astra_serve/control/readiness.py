"""Which required adapters a server that starts waits for.

A required adapter that is added later takes no server out of rotation: all replicas read the same document, and would
stop serving everything else at once.
"""

from astra_serve.adapters.fleet import Fleet
from astra_serve.control.reconcile import Reconciler
from astra_serve.document.desired import Document


class RequiredAdapters:
    """The required adapters of the first document, until each has been served once."""

    def __init__(self, fleet: Fleet, reconciler: Reconciler) -> None:
        self._fleet, self._reconciler = fleet, reconciler
        self._awaited: set[str] | None = None  # None before the first document

    def follow(self, document: Document) -> None:
        """Wait for the required adapters of the first document, as long as the later ones require them, too."""
        required = {adapter.name for adapter in document.adapters if adapter.required}
        self._awaited = required if self._awaited is None else self._awaited & required

    def not_ready(self) -> list[str]:
        """Return a reason for each adapter that the server waits for."""
        if self._awaited:
            self._awaited -= self._fleet.aliases.keys()
        return [
            f"{name}: {one.phase}" for name, one in self._reconciler.status.items() if name in (self._awaited or ())
        ]
