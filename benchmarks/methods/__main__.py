"""Does Astra converge faster and to a lower loss than other methods, at which rank, and does it forget more?

    python -m benchmarks.methods --suite small|medium|real --out DIR [--only core figure2 ...] [--minutes 8] [--redraw]

For each method, the learning rate is searched with one seed (five values in factors of two, and more until the best one
is not at the edge); then three seeds run at the best rate. Data and their order, target layers, batch, schedule and
steps are the same for all methods. A run is one line of DIR/runs.jsonl; runs that are in the file are not repeated, so
the same command continues where it was stopped. Tables and figures are made from that file; --redraw does only that.
The suite real asks the question on real models and public tasks (`benchmarks.methods.real`); it needs the packages gguf
and reasoning-gym, and runs on the CPU or, if torch finds one, on a GPU.
"""

import argparse
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.methods import bases, pool, real, real_tables, summary
from benchmarks.methods.suite import PARTS, SUITES, missing
from benchmarks.methods.trial import Results

console = Console(width=max(140, Console().width))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=[*SUITES, "real"], required=True, help="small: two cores; medium: one GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, tables and figures")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run (default: all)")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core; with a GPU: 1)")
    parser.add_argument("--minutes", type=float, help="start no run after this many minutes")
    parser.add_argument("--redraw", action="store_true", help="run nothing, only make tables and figures")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file; give a folder")
    known = real.PARTS if args.suite == "real" else PARTS
    for part in args.only or ():
        if part not in known:
            parser.error(f"--only: {part} is no part of the suite {args.suite}; its parts: {', '.join(known)}")
    if args.suite == "real" and not args.redraw and find_spec("reasoning_gym") is None:
        parser.error("the suite real needs the tasks of a package: pip install reasoning-gym==0.1.25")
    results, failed = Results(args.out / "runs.jsonl"), 0
    if args.suite == "real":
        still_missing = partial(real.missing, args.only or known)
        write = partial(real_tables.write, args.out)
    else:
        still_missing = partial(missing, args.only or known, SUITES[args.suite])
        write = partial(summary.write, args.out, SUITES[args.suite])
    if not args.redraw:
        todo = still_missing(results)
        for base in sorted({trial.base for trial in todo}):
            bases.folder(base)
            bases.own_text(base)
        workers = args.workers or (1 if torch.cuda.is_available() else torch.get_num_threads())
        failed = pool.run(lambda: still_missing(results), results, workers, args.minutes, console)
    remaining = len(still_missing(results))
    write(results, console)
    if remaining:
        console.print(f"at least {remaining} runs are missing: repeat the command to continue")
    if results.ignored:
        console.print(f"{len(results.ignored)} runs of another protocol are ignored, for example {results.ignored[0]}")
    if results.torn:
        console.print(f"{results.torn} incomplete lines of {results.file} are ignored: their runs count as missing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
