"""Runs inside the engine's processes: they live and end with the server that started them, and on its word alone.

Without it, engine processes outlive a server that was killed, with all their memory; and Ctrl-C on a terminal, which
every process of the group gets, ends the engine under the requests that the server is still waiting for.
"""

import ctypes
import multiprocessing
import os
import signal
import sys

PARENT = "ASTRA_SERVE"  # set by `engine`, for its children
_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Entry point of `vllm.general_plugins`; does nothing in the server itself, nor without `astra-serve`."""
    if PARENT not in os.environ or multiprocessing.parent_process() is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
