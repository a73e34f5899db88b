"""Programs that call the admin API of one server or of several: the command line, and a client for Python.

from astra_serve.client import AsyncClient, Client
"""

from astra_serve.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
