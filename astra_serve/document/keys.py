"""The keys document: which tenants there are, which keys open what, and how much of it.

    tenants:
      - name: search
        keys:                                # several: a new key is added before the old one is revoked
          - {hash: sha256:3f2a..., label: ci, expires: 2027-03-01T00:00:00Z}
        adapters: [sql, "search/*"]          # names and globs; `*` and `?` do not cross the slash
        base: false                          # the base model itself
        pinned_versions: false               # requests for NAME@DIGEST
        limits:
          requests_per_minute: 600
          tokens_per_minute: 200000          # of prompts and answers
          tokens_per_day: 20000000
          requests_at_a_time: 32
          default_max_tokens: 1024           # reserved for an answer whose request has no max_tokens
        weight: 1                            # share of a full engine, relative to the other tenants
        usage: true                          # may read its own GET /usage
        metrics: false                       # may read GET /metrics, which names every adapter and tenant

It has the hashes of keys and never a key: `astra-serve keys new` shows a key once. Every server follows it.
"""

import hashlib
import re
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, Field, StringConstraints, ValidationError

from astra_serve.document.strict import Place, Strict, content_of, first_fault, replaced
from astra_serve.errors import BadDocument

TENANT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
HASH = r"sha256:[0-9a-f]{64}"
_PART = r"[A-Za-z0-9*?][A-Za-z0-9._*?-]{0,127}"
GLOB = rf"{_PART}(/{_PART})?"
MOST_LABEL = 128  # characters
LABEL = r"[^\p{C}\p{Zl}\p{Zp}]*"  # it is printed: neither control characters, as ESC, nor other lines
_IN_WORDS = {
    f"^{TENANT}$": "use up to 64 letters, digits, '.', '_' and '-', a letter or digit first",
    f"^{HASH}$": "a hash is sha256: and 64 hexadecimal digits, as `astra-serve keys new` writes it",
    f"^{GLOB}$": "an adapter's name or a glob: letters, digits, '.', '_', '-', '*', '?', and at most one slash",
    f"^{LABEL}$": "a label is one line of characters that can be printed",
}
TenantName = Annotated[str, StringConstraints(pattern=f"^{TENANT}$")]
KeyHash = Annotated[str, StringConstraints(pattern=f"^{HASH}$")]
Label = Annotated[str, StringConstraints(pattern=f"^{LABEL}$")]
Glob = Annotated[str, StringConstraints(pattern=f"^{GLOB}$")]


class Key(Strict):
    """One key of a tenant."""

    hash: KeyHash = Field(description="SHA-256 of the key")
    label: Label = Field(default="", max_length=MOST_LABEL, description="for people: who or what uses the key")
    expires: AwareDatetime | None = Field(default=None, description="the key opens nothing from then on")


class TenantLimits(Strict):
    """How much a tenant may use; a limit that is absent does not exist."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1, description="tokens of prompts and answers")
    tokens_per_day: int | None = Field(default=None, ge=1, description="tokens of prompts and answers")
    requests_at_a_time: int | None = Field(default=None, ge=1)
    default_max_tokens: int = Field(
        default=1024, ge=1, description="tokens that are reserved for an answer whose request has no max_tokens"
    )


class Tenant(Strict):
    """A team, or another owner of keys."""

    name: TenantName
    keys: list[Key] = Field(default_factory=list, description="each of them opens the same")
    adapters: list[Glob] = Field(default_factory=list, description="names and globs of adapters that it may use")
    base: bool = Field(default=False, description="whether it may use the base itself")
    pinned_versions: bool = Field(default=False, description="whether it may ask for NAME@DIGEST")
    limits: TenantLimits = Field(default_factory=TenantLimits)
    weight: float = Field(default=1.0, gt=0, le=1e6, description="share of a full engine, relative to other tenants")
    usage: bool = Field(default=False, description="whether it may read its own usage")
    metrics: bool = Field(default=False, description="whether it may read the metrics, which name all tenants")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(_regex, self.adapters)) or "(?!)")

    def may_use(self, adapter: str) -> bool:
        """Return whether it may use an adapter of this name, which may exist or not."""
        return self._pattern.fullmatch(adapter) is not None


class Keys(Strict):
    """The tenants and their keys."""

    tenants: list[Tenant] = Field(default_factory=list, description="in any order")

    def model_post_init(self, _: Any) -> None:
        """Raise ValueError where two tenants have one name or one key."""
        names, owners = set[str](), dict[str, str]()
        for tenant in self.tenants:
            if tenant.name in names:
                raise ValueError(f"two tenants are named {tenant.name!r}")
            names.add(tenant.name)
            for key in tenant.keys:
                if owner := owners.get(key.hash):
                    raise ValueError(f"{owner!r} and {tenant.name!r} have the same key {key.hash[:19]}...")
                owners[key.hash] = tenant.name

    def get(self, name: str) -> Tenant | None:
        """Return the tenant `name`, or None."""
        return next((tenant for tenant in self.tenants if tenant.name == name), None)

    def replacing(self, name: str, old: Tenant | None, new: Tenant | None) -> "Keys":
        """Return the document with the tenant `new` in place of `old`; None stands for no tenant. Raises Conflict."""
        return Keys(tenants=replaced(self.tenants, name, old, new))


def parse(text: str, origin: str) -> Keys:
    """Return the document in `text`, YAML or JSON. Raises BadDocument with `origin` and the fault in one line."""
    content = content_of(text, origin) if text.strip() else None
    if not content:
        raise BadDocument(f"{origin} has no 'tenants': write 'tenants: []' to let nobody in")
    place: Place = ()
    try:
        if not isinstance(content, dict) or set(content) != {"tenants"} or not isinstance(content["tenants"], list):
            return Keys.model_validate(content)
        tenants = []
        for number, found in enumerate(content["tenants"]):  # one by one: other threads run between two of them
            place = ("tenants", number)
            tenants.append(Tenant.model_validate(found))
        place = ()
        return Keys(tenants=tenants)
    except ValidationError as error:
        raise BadDocument(f"{origin}: {first_fault(error, _model_at, _IN_WORDS, place)}") from error


def tenant(content: dict[str, Any]) -> Tenant:
    """Return a tenant of the document. Raises BadDocument with the fault in one line."""
    try:
        return Tenant.model_validate(content)
    except ValidationError as error:
        raise BadDocument(first_fault(error, _model_at, _IN_WORDS, ("tenants",))) from error


def key(content: dict[str, Any]) -> Key:
    """Return a key of the document. Raises BadDocument with the fault in one line."""
    try:
        return Key.model_validate(content)
    except ValidationError as error:
        raise BadDocument(first_fault(error, _model_at, _IN_WORDS, ("keys",))) from error


def hash_of(key: str) -> str:
    """Return the hash by which a document knows a key: sha256:HEX."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the document."""
    return Keys.model_json_schema()


def expired(key: Key, now: datetime) -> bool:
    """Return whether a key opens nothing any more."""
    return key.expires is not None and key.expires <= now


def _regex(glob: str) -> str:
    """Return the regular expression of a glob, whose `*` and `?` do not match a slash."""
    return "".join({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)) for char in glob)


def _model_at(place: Place) -> type[BaseModel]:
    if not place:
        return Keys
    return Key if "keys" in place else TenantLimits if "limits" in place else Tenant
