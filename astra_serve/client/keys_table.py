"""Tenants and their keys as people see them: a table, or JSON. A key has the first digits of its hash as its name."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from astra_serve.document import keys
from astra_serve.document.keys import Key, Tenant, TenantLimits

RIGHTS = ("base", "pinned_versions", "usage", "metrics")
SHOWN = 12  # digits of a hash, as those of versions


def table(tenants: Iterable[Tenant], now: datetime) -> Table:
    """Return one row for each key."""
    found = Table("tenant", "adapters", "limits", "key", "label", "expires")
    for tenant in tenants:
        first = [tenant.name, "\n".join([*tenant.adapters, *_rights(tenant)]), "\n".join(_limits(tenant))]
        if not tenant.keys:
            found.add_row(*map(Text, first), "no keys")
        for key in tenant.keys:
            end = f"{key.expires:%Y-%m-%d %H:%M} UTC" if key.expires else "never"
            shown = Text("expired", "red") if keys.expired(key, now) else Text(end)
            found.add_row(*map(Text, [*first, digits(key), key.label]), shown)
            first = ["", "", ""]
    return found


def described(tenant: Tenant, now: datetime) -> dict[str, Any]:
    """Return a tenant as its document has it, with every default, and with `expired` of each key."""
    found = tenant.model_dump(mode="json")
    for key, shown in zip(tenant.keys, found["keys"], strict=True):
        shown["expired"] = keys.expired(key, now)
    return found


def _rights(tenant: Tenant) -> list[str]:
    return [f"({name.replace('_', ' ')})" for name in RIGHTS if getattr(tenant, name)]


def _limits(tenant: Tenant) -> list[str]:
    found = {name: value for name in TenantLimits.model_fields if (value := getattr(tenant.limits, name)) is not None}
    del found["default_max_tokens"]  # every tenant has it
    return [f"{value:,} {name.replace('_', ' ')}" for name, value in found.items()] or ["none"]


def digits(key: Key) -> str:
    """Return the first digits of a key's hash."""
    return key.hash.removeprefix("sha256:")[:SHOWN]
