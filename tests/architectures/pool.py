"""Prove several architectures at one time, each on a core of its own."""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import Queue
from pathlib import Path

from tests.architectures.row import Row


def prove_all(names: Sequence[str], jobs: int, work: Path) -> Iterator[Row]:
    """Yield the row of each architecture as it is finished; print it, and at the end the seconds of all parts."""
    context = multiprocessing.get_context("spawn")
    cores: Queue[int] = context.Queue()
    own = sorted(os.sched_getaffinity(0))[:jobs]
    for core in own:
        cores.put(core)
    seconds, began = dict[str, float](), time.monotonic()
    with ProcessPoolExecutor(len(own), context, _use_one_core, (cores,)) as pool:
        for done in as_completed([pool.submit(_prove, name, work) for name in names]):
            row, parts = done.result()
            print(
                f"{row.architecture:20}",
                *(f"{key}={value}" for key, value in row.cells.items() if key not in ("architecture", "kind")),
                row.figures,
                flush=True,
            )
            seconds |= {part: seconds.get(part, 0.0) + value for part, value in parts.items()}
            yield row
    spent = ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items())
    print(f"{len(names)} architectures in {time.monotonic() - began:.0f} s with {len(own)} processes: {spent}")


def _use_one_core(cores: "Queue[int]") -> None:
    """Keep this process, and the engines that it starts, on a core of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {cores.get()})


def _prove(name: str, work: Path) -> tuple[Row, dict[str, float]]:
    from tests.architectures.prove import prove  # imports the trainer and vLLM, once in each process

    return prove(name, work)
