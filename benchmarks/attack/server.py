"""The server that is attacked, from its start to its end."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Document
from benchmarks.attack.target import Target
from tests.support import demo
from tests.support.server import astra_serve, free_port

TOKEN = "attack-token"  # noqa: S105


@contextmanager
def started(folder: Path, good: list[Path]) -> Iterator[Target]:
    """Start a server whose document names the `good` adapters, and yield it when it is ready."""
    os.environ["ASTRA_ADMIN_TOKEN"] = TOKEN
    document = folder / "served" / "adapters.yaml"
    document.parent.mkdir()
    entries = [Adapter(name=n, source=str(f), required=True) for n, f in zip(("sql", "intent"), good, strict=True)]
    document.write_text(desired.dump(Document(adapters=entries)))
    port = free_port()
    options = ["--base", str(demo.BASE), "--adapters", str(document), "--store", str(folder / "store")]
    with astra_serve([*options, "--admin-port", str(port)], folder / "server.log") as server:
        while httpx.get(f"{server.url}/readyz").status_code != httpx.codes.OK:
            time.sleep(0.2)
        yield Target(server, port, TOKEN, document, good, folder)
