"""Every line that this process and its children write to stdout and stderr, as one JSON object.

vLLM's loggers write JSON; libraries below them (C++ warnings, progress bars, Python's own warnings, in several
processes) write text to the same streams. Both streams become pipes, and a thread for each hands JSON lines on as they
are and makes JSON of the others. The fields are those of vLLM's formatter.
"""

import json
import os
import re
import sys
import threading
from datetime import datetime
from typing import IO

JOIN_S = 5.0  # for the last lines


class JsonLines:
    """The streams of this process, from `start` to `close`."""

    def __init__(self) -> None:
        self._streams: list[tuple[int, int, threading.Thread]] = []  # its number, the original, the reader
        self._end = f"end of {os.getpid()} {os.urandom(8).hex()}"

    def start(self) -> None:
        """Begin to make JSON of the lines of both streams."""
        for number, name in ((1, "stdout"), (2, "stderr")):
            original = os.dup(number)
            reading, writing = os.pipe()
            os.dup2(writing, number)  # the children inherit it
            os.close(writing)
            reader = threading.Thread(
                target=self._read, args=(os.fdopen(reading, errors="replace"), original, name), daemon=True
            )
            reader.start()
            self._streams.append((number, original, reader))

    def close(self) -> None:
        """Write the lines that are still in the pipes, and give the streams back."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, original, reader in self._streams:
            os.write(number, f"\n{self._end}\n".encode())  # children may keep the pipe open
            os.dup2(original, number)
            reader.join(JOIN_S)
            os.close(original)
        self._streams = []

    def _read(self, lines: IO[str], original: int, name: str) -> None:
        with lines:
            for line in lines:
                if line.rstrip("\n") == self._end:
                    return
                for text in json_lines(line, name):
                    os.write(original, f"{text}\n".encode())


def json_lines(line: str, stream: str) -> list[str]:
    """Return a line as it is if it is a JSON object; otherwise one for each of its parts between carriage returns."""
    if line.startswith("{"):
        try:
            json.loads(line)
        except ValueError:
            pass
        else:
            return [line.rstrip("\n")]
    parts = [part for part in re.split("[\r\n]", line) if part.strip()]
    return [json.dumps(_record(part, stream)) for part in parts]


def _record(text: str, stream: str) -> dict[str, str]:
    level = "ERROR" if text.startswith(("astra-serve: ", "Traceback")) else "INFO"
    level = "WARNING" if "warning" in text.lower() else level
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
    return {"asctime": now, "levelname": level, "name": stream, "message": text}
