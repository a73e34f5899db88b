"""Tables and figures from the runs that there are."""

from pathlib import Path

from rich.console import Console

from benchmarks.methods.suite import Suite
from benchmarks.methods.trial import Results


def write(out: Path, suite: Suite, results: Results, console: Console) -> None:
    """Draw what there is."""
