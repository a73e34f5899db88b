"""How the server's processes end: together, with the server, and never because one of them alone got a signal.

In the engine's processes (`register`): without it they outlive a server that was killed, with all their memory, and
Ctrl-C on a terminal, which every process of the group gets, ends the engine under requests that still run.

In the server while it starts (`ended_by_signals`): the engine starts in blocking calls, and an exception that a signal
handler raises is lost there (pyzmq's poll swallows it). So the handler itself ends all processes.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from astra_serve.parent_death import end_with_parent

PARENT = "ASTRA_SERVE"  # set by `options`, for the server's children


def register() -> None:
    """Entry point of `vllm.general_plugins`; does nothing in the server itself, nor without `astra-serve`."""
    if PARENT not in os.environ or multiprocessing.parent_process() is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


@contextmanager
def ended_by_signals(before_exit: Callable[[], None]) -> Iterator[None]:
    """Let SIGTERM and SIGINT end this process and its descendants at once while the block runs.

    `before_exit` is called before the process exits, with status 143 or 130.
    """

    def end(number: int, _: FrameType | None) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        before_exit()
        os._exit(128 + number)

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
