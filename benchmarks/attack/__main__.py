"""Attack a server of the embedded base in all ways of this package, and write what was tried and what did harm."""

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import benchmarks.attack as about
from benchmarks import report
from benchmarks.attack import fuzz, pressure, publishing, requests, sockets, storm
from benchmarks.attack.server import started
from benchmarks.attack.target import Target, Tried
from tests.support.server import astra_serve
from tests.support.swap import train_adapters

console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=about.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--adapters", nargs=2, type=Path, metavar="DIR", help="two LoRAs of the embedded base")
    parser.add_argument("--schemathesis", type=Path, help="the program; without it nothing is fuzzed")
    parser.add_argument("--fuzz-seconds", type=int, default=90, help="for each port (default: 90)")
    args = parser.parse_args()
    env, began = report.environment(0), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        good = args.adapters or train_adapters(folder)
        with started(folder, list(good)) as target:
            target.check_neighbours("before")
            for name, stage in {
                "requests": lambda: requests.attack(target),
                "sockets": lambda: sockets.attack(target),
                "publishing": lambda: publishing.attack(target),
                "storm": lambda: storm.attack(target, 60),
                "fuzz": lambda: args.schemathesis and fuzz.attack(target, args.schemathesis, args.fuzz_seconds),
            }.items():
                console.print(f"{time.monotonic() - began:4.0f} s  {name}", highlight=False)
                stage()
                target.check_neighbours(name)
        status = target.server.process.wait(60)
        target.tried.append(Tried("end", "SIGTERM", f"the server ends with {status}" if status else None))
        console.print(f"{time.monotonic() - began:4.0f} s  pressure", highlight=False)
        with astra_serve(pressure.options(folder), folder / "pressure.log") as other:
            target.tried += pressure.attack(other.url, 45)
    return show(target, env, args.out, time.monotonic() - began)


def show(target: Target, env: dict, out: Path, seconds: float) -> int:  # type: ignore[type-arg]
    faults = [asdict(one) for one in target.tried if one.fault]
    tried = Counter(one.stage for one in target.tried)
    for fault in faults:
        console.print(
            f"{fault['stage']}: {fault['name']}: {fault['fault']}", style="red", highlight=False, markup=False
        )
    report.write(
        out,
        {"tried": len(target.tried), "faults": len(faults), "by_stage": dict(tried), "seconds": round(seconds)},
        [{"stage": one.stage, "name": one.name, "fault": one.fault} for one in target.tried],
        env,
    )
    console.print(f"attack: {len(target.tried)} tried, {len(faults)} faults", highlight=False)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
