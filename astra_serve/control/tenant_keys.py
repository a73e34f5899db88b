"""The keys document that one server follows: a key is added, or opens nothing any more, without a restart.

Until the document has been read, nobody is let in but with a key of `--api-key`. Later the last good one is followed
while the present text cannot be read: the event `keys_failed` and the metric `astra_keys_fault` say so.
"""

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Event, Events
from astra_serve.adapters.fetch import Sources
from astra_serve.control.followed import Followed, follow
from astra_serve.document import keys
from astra_serve.document.keys import Keys
from astra_serve.gateway.tenancy.keyring import Keyring


class TenantKeys(Followed[Keys]):
    """The document of tenants at `where`, and the keyring that knows its keys."""

    def __init__(self, where: str, keyring: Keyring, events: Events, clock: Clock, sources: Sources) -> None:
        super().__init__(where, Keys(), sources)
        self._keyring, self._events, self._clock = keyring, events, clock

    async def run(self) -> None:
        """Read the document and follow it until cancelled."""
        await follow(self, self.refresh, self._clock)

    async def refresh(self) -> None:
        """Read the document again and follow its changes; one that cannot be read changes nothing."""
        fault, known = self.fault, self.content
        if await self.read():
            if self.content is not known:
                self._keyring.replace(self.content)
        elif self.fault != fault:
            self._events.emit(Event("", "keys_failed", reason=self.fault))

    def not_ready(self) -> list[str]:
        """Return a reason where the document has never been read: nobody of it is let in."""
        return [] if self.read_once else [f"the keys document has not been read: {self.fault or 'not yet'}"]

    def _parse(self, text: str) -> Keys:
        return keys.parse(text, self._where)
