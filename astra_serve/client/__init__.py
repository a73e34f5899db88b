"""Programs that call the admin API of one server or of several: the command line, and a client for Python.

    from astra_serve.client import AsyncClient, Client, PublishCallback

Importing this is light: `PublishCallback`, which needs transformers, is imported at its first use.
"""

from typing import TYPE_CHECKING, Any

from astra_serve.client.client import AsyncClient, Client

if TYPE_CHECKING:
    from astra_serve.client.publish_callback import PublishCallback

__all__ = ["AsyncClient", "Client", "PublishCallback"]


def __getattr__(name: str) -> Any:
    if name == "PublishCallback":
        from astra_serve.client.publish_callback import PublishCallback

        return PublishCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
