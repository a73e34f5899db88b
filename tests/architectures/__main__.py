"""`make model-test`: prove all architectures, print the table, and compare it with the recorded one.

    python -m tests.architectures [--only NAME ...] [--jobs N] [--write]

Each core proves one architecture at a time. The exit status is 1 if a cell differs from `results.json`; with `--write`
the result is recorded there and in trainer/README.md instead.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.architectures import table
from tests.architectures.pool import prove_all


def main() -> int:
    """Run the command line; return 0 if every cell is as recorded, else 1."""
    from tests.architectures.models import ARCHITECTURES

    names = list(ARCHITECTURES)
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description="Prove all architectures.")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="architectures at one time")
    parser.add_argument("--write", action="store_true", help="record the result")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="architectures-"))
    expected = table.load()
    rows = {row.architecture: row for row in expected if row.architecture in names}
    found = []
    for row in prove_all(args.only, args.jobs, work):
        found.append(row)
        rows[row.architecture] = row
        if args.write:  # after each row: a run takes minutes
            table.save([rows[name] for name in names if name in rows])
    print(table.markdown([rows[name] for name in names if name in args.only]))
    if args.write:
        page = table.with_table(table.PAGE.read_text(encoding="utf-8"), table.markdown(table.load()))
        table.PAGE.write_text(page, encoding="utf-8")
    elif different := table.differences(found, expected):
        print(*different, f"The logs are in {work}.", sep="\n", file=sys.stderr)
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
