"""Run trials in several processes with one thread each: a small model gains little from a second thread."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.methods.run import execute, prepare
from benchmarks.methods.trial import Outcome, Results, Trial


def _prepare(threads: int) -> None:
    prepare(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has been killed: it would run on otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run(
    missing: Callable[[], list[Trial]], results: Results, workers: int, minutes: float | None, console: Console
) -> int:
    """Run the trials that `missing` returns, called again after each run, until there are none or `minutes` are over.

    Return the number of trials that failed with an exception; a trial that diverged has an outcome and is not counted.
    """
    began = time.monotonic()
    threads = max(1, torch.get_num_threads() // workers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(
            *columns, TextColumn("remaining:"), TimeRemainingColumn(), console=console, speed_estimate_period=600
        ) as bar,
        ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(threads,)) as pool,
    ):
        shown = bar.add_task("runs", total=len(missing()))
        running: dict[Future[tuple[Outcome, dict[str, Any]]], Trial] = {}
        failed: set[Trial] = set()
        done = 0
        while True:
            late = minutes is not None and time.monotonic() - began > 60 * minutes
            waiting = [trial for trial in missing() if trial not in failed | {*running.values()}]
            for trial in [] if late else waiting[: workers - len(running)]:
                running[pool.submit(execute, trial)] = trial
            if not running:
                return len(failed)
            bar.update(shown, total=done + len(waiting) + len(running), completed=done)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                trial = running.pop(future)
                done += 1
                try:
                    outcome, env = future.result()
                except Exception as error:  # of any kind: the other trials continue
                    failed.add(trial)
                    console.print(f"{trial.name}  failed: {type(error).__name__}: {error}", highlight=False)
                    continue
                results.add(trial, outcome, env)
                loss = "diverged" if outcome.error else f"{outcome.validation:.4f} validation"
                console.print(f"{trial.name.rpartition('.')[0]}  {loss}  {outcome.seconds:.0f} s", highlight=False)
