"""A slow HTTP server for folders, so that a test can act while an adapter is being fetched."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

DELAY_S = 0.1  # before each file


@contextmanager
def slow_files(root: Path, folders: list[Path]) -> Iterator[list[str]]:
    """Serve `folders` over HTTP with a delay before each file, and yield their URLs; `root` becomes a new folder."""
    root.mkdir()
    for number, folder in enumerate(folders):
        (root / str(number)).symlink_to(folder.resolve())

    class Slow(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def do_GET(self) -> None:
            time.sleep(DELAY_S)
            with suppress(ConnectionError):  # the client was killed
                super().do_GET()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield [f"http://127.0.0.1:{server.server_port}/{number}" for number in range(len(folders))]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
