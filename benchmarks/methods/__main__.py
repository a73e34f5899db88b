"""Does Astra converge faster and end lower than other methods, at which rank, and does it forget more?

    python -m benchmarks.methods --suite small|medium --out DIR [--only core figure2 ...] [--minutes 8] [--redraw]

Every method searches its own learning rate with one seed (five values, factors of two, more until the best is not at
the edge) and then runs with three seeds at the best one; data, their order, target layers, batch, schedule and steps
are the same for all. A run is one line of DIR/runs.jsonl; runs that are in the file are not repeated, so the same
command continues where it was stopped. Tables and figures are drawn from that file: --redraw does only that.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.methods import bases, pool, summary
from benchmarks.methods.suite import PARTS, SUITES, missing
from benchmarks.methods.trial import Results

console = Console(width=max(140, Console().width))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, required=True, help="small: two cores; medium: one GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, tables and figures")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--workers", type=int, help="processes at a time (default: one a core, or one on a GPU)")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--redraw", action="store_true", help="run nothing: draw again what there is")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file; give a folder")
    suite, results, failed = SUITES[args.suite], Results(args.out / "runs.jsonl"), 0
    if not args.redraw:
        todo = missing(args.only, suite, results)
        for base in sorted({trial.base for trial in todo}):
            bases.folder(base)
            bases.own_text(base)
        workers = args.workers or (1 if torch.cuda.is_available() else torch.get_num_threads())
        failed = pool.run(lambda: missing(args.only, suite, results), results, workers, args.minutes, console)
    left = len(missing(args.only, suite, results))
    summary.write(args.out, suite, results, console)
    if left:
        console.print(f"{left} runs or more are still missing: the same command goes on")
    if results.ignored:
        console.print(f"{len(results.ignored)} runs of another protocol are ignored, for example {results.ignored[0]}")
    if results.torn:
        console.print(f"{results.torn} incomplete lines of {results.file} are ignored: their runs count as missing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
