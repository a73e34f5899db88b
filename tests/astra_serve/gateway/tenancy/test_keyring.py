"""Keys by their hash: rotation, revocation, the end of a key by the clock, and the salts of tenants."""

from starlette.datastructures import Headers

from astra_serve.document import keys
from astra_serve.document.keys import hash_of
from astra_serve.gateway.tenancy.caller import ALL, Caller
from astra_serve.gateway.tenancy.keyring import Keyring


class Ring:
    """A keyring that follows a document, and its clock."""

    def __init__(self, *api_keys: str) -> None:
        self.now = 0.0
        self.keyring = Keyring(api_keys, follows=True, now=lambda: self.now)

    def follow(self, **tenants: dict[str, str | None]) -> None:
        """Follow a document: keys with their ends, by tenant."""
        content = [
            {
                "name": name,
                "keys": [{"hash": hash_of(key)} | ({"expires": end} if end else {}) for key, end in of.items()],
            }
            for name, of in tenants.items()
        ]
        self.keyring.replace(keys.parse(str({"tenants": content}), "x"))

    def of(self, key: str) -> str | None:
        found = self.caller(key)
        return found.name if found else None

    def caller(self, key: str) -> Caller | None:
        return self.keyring.caller(Headers({"Authorization": f"Bearer {key}"}))


def test_before_a_document_only_keys_of_the_command_line_open_anything() -> None:
    ring = Ring("fixed")
    assert (ring.of("fixed"), ring.of("other"), ring.keyring.caller(Headers())) == (ALL, None, None)
    assert Ring().of("other") is None


def test_an_old_and_a_new_key_open_the_same_until_the_old_one_is_revoked() -> None:
    ring = Ring()
    ring.follow(t={"old": None, "new": None})
    assert (ring.of("old"), ring.caller("old")) == ("t", ring.caller("new"))
    ring.follow(t={"new": None})
    assert (ring.of("old"), ring.of("new")) == (None, "t")


def test_a_key_ends_by_the_clock_while_the_document_stays() -> None:
    ring = Ring()
    ring.follow(t={"short": "1970-01-01T00:01:00Z", "long": None})
    ring.now = 59.9
    assert ring.of("short") == "t"
    ring.now = 60.0
    assert (ring.of("short"), ring.of("long")) == (None, "t")


def test_the_hash_of_a_key_opens_nothing() -> None:
    ring = Ring("fixed")
    ring.follow(t={"key": None})
    assert [ring.of(hash_of(key)) for key in ("key", "fixed")] == [None, None]


def test_a_key_of_the_command_line_that_the_document_has_too_opens_everything() -> None:
    ring = Ring("fixed")
    ring.follow(t={"fixed": None})
    assert ring.of("fixed") == ALL


def test_tenants_have_salts_of_their_own_which_a_new_document_does_not_change() -> None:
    ring = Ring("fixed")
    ring.follow(t={"a": None, "b": None}, u={"c": None})
    salts = [found.cache_salt for key in ("a", "b", "c", "fixed") if (found := ring.caller(key))]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3
    assert None not in salts
    ring.follow(t={"new": None})
    found = ring.caller("new")
    assert found
    assert found.cache_salt == salts[0]
