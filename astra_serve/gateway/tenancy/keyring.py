"""Keys by their SHA-256: which tenant a request's headers belong to.

The comparison is a look-up of a hash of 256-bit random keys: its time says nothing about any key.
"""

import hmac
import secrets
import time
from collections.abc import Callable, Collection

from starlette.datastructures import Headers

from astra_serve.document.keys import Keys, hash_of
from astra_serve.gateway.tenancy.caller import ALL, EVERYTHING, Caller


class Keyring:
    """The keys of `--api-key`, which open everything, and those of the keys document.

    Prompts of different tenants share no blocks of the prefix cache: otherwise the time to the first token tells one
    what another has asked. Each key of `--api-key` has blocks of its own. The salts are other ones in each process.
    """

    def __init__(
        self, api_keys: Collection[str], *, follows: bool = False, now: Callable[[], float] = time.time
    ) -> None:
        """`follows`: a keys document will be given to `replace`; until then it lets nobody in."""
        self.follows = follows
        self._now, self._secret = now, secrets.token_bytes(32)
        alone = len(set(api_keys)) < 2 and not follows  # nothing to hide, and no salt
        self._fixed = {hash_of(key): Caller(ALL, None, None if alone else self._salt(f"key {key}")) for key in api_keys}
        self._found: dict[str, tuple[Caller, float | None]] = {}  # with the end of the key, in seconds since 1970

    def replace(self, keys: Keys) -> None:
        """Know the keys of a document, in place of those of the one before."""
        found: dict[str, tuple[Caller, float | None]] = {}
        for tenant in keys.tenants:
            caller = Caller(tenant.name, tenant, self._salt(f"tenant {tenant.name}"))
            for key in tenant.keys:
                found[key.hash] = caller, key.expires.timestamp() if key.expires else None
        self._found = found

    def tenants(self) -> set[str]:
        """Return the names of the document's tenants that have keys."""
        return {caller.name for caller, _ in self._found.values()}

    def caller(self, headers: Headers) -> Caller | None:
        """Return whose key the headers have; None where they have none that opens anything."""
        if not (self.follows or self._fixed):
            return EVERYTHING
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        hashed = hash_of(key)
        if fixed := self._fixed.get(hashed):
            return fixed
        caller, end = self._found.get(hashed, (None, None))
        return None if end is not None and end <= self._now() else caller

    def _salt(self, subject: str) -> str:
        return hmac.digest(self._secret, subject.encode(), "sha256").hex()
