"""The environment variables of `astra-serve` and its clients."""

import os

ADMIN_TOKEN = "ASTRA_ADMIN_TOKEN"  # noqa: S105 (its name)
LIMITS_STORE = "ASTRA_LIMITS_STORE"
ADMIN_URL = "ASTRA_ADMIN_URL"
KEYS = "ASTRA_KEYS"  # where the keys document is
POLICY_TOKEN = "ASTRA_POLICY_TOKEN"  # noqa: S105 (its name)


def admin_token() -> str:
    """Return the token of the admin API, empty where there is none; a Secret made of a file ends with a newline."""
    return os.environ.get(ADMIN_TOKEN, "").strip()


def policy_token() -> str:
    """Return the token of the policy port: its own one, otherwise that of the admin API; empty where there is none."""
    return os.environ.get(POLICY_TOKEN, "").strip() or admin_token()


def limits_store() -> str | None:
    """Return the address of the store of limits, which may have a password; None where there is none."""
    return os.environ.get(LIMITS_STORE, "").strip() or None
