"""The environment variables of `astra-serve` and its clients."""

import os

ADMIN_TOKEN = "ASTRA_ADMIN_TOKEN"  # noqa: S105 (its name)
ADMIN_URL = "ASTRA_ADMIN_URL"


def admin_token() -> str:
    """Return the token of the admin API, empty where there is none; a Secret made of a file ends with a newline."""
    return os.environ.get(ADMIN_TOKEN, "").strip()
