"""Does a server stay right, and its memory flat, under an hour of swaps, disconnects and hostile publications?

    python -m benchmarks.soak --out FILE.json [--minutes 60] [--adapters DIR DIR]

The storm of `benchmarks.attack`, for longer: one name is swapped once a second under load, clients leave in the middle,
hostile adapters are published, and every answer is compared. After a warm-up of a minute the memory of all processes of
the server is measured at each swap: the median of the last tenth, divided by that of the first, is wanted at most 1.03.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.attack.server import started
from benchmarks.attack.storm import fault, storm
from tests.support.hostile import hostile
from tests.support.swap import Pace, train_adapters

WARM_UP_S = 60.0
MOST_GROWTH = 1.03
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--minutes", type=float, default=60.0, help="(default: 60)")
    parser.add_argument("--adapters", nargs=2, type=Path, metavar="DIR", help="two LoRAs of the embedded base")
    args = parser.parse_args()
    env = report.environment(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        good = list(args.adapters or train_adapters(folder))
        with started(folder, good) as target:
            folders = [copy for _, copy in hostile(good[0], folder / "hostile")]
            swaps = max(40, int(args.minutes * 60))
            found = asyncio.run(storm(target, folders, Pace(swaps, 1.0, WARM_UP_S)))
            target.check_neighbours("soak")
    memory = found["rss_gib"]
    tenth = max(1, len(memory) // 10)
    growth = statistics.median(memory[-tenth:]) / statistics.median(memory[:tenth])
    faults = [text for text in (fault(found), *(one.fault for one in target.tried)) if text]
    summary = {key: found[key] for key in ("swaps", "requests", "failed", "mixed", "stale")}
    summary |= {"minutes": args.minutes, "memory_growth": growth, "target": MOST_GROWTH, "faults": faults}
    report.write(args.out, summary, [found], env)
    console.print(summary)
    return 1 if faults or growth > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
