"""How much time do tenants add to a request in the gateway? The engine is a stub that answers at once.

    python -m benchmarks.gateway --out FILE.json [--quick] [--requests 100000]

The gateway of `astra-serve` is called in this process, without HTTP: key, body, model, quota, lease, place, answer
and ledger. 1,000 tenants have ten keys and one adapter each; every request is one of a random tenant. The two
cases take turns of 1,000 requests (the last two of 100), and the median of a request's time counts:

    plain    a server without a keys document
    tenant   with one, every tenant with all limits, counted in memory; a place in the engine is always free
    hidden   as `tenant`, for an adapter of another tenant, which gets 404
    absent   as `hidden`, for an adapter that nobody has: the same time, or it could be found out which adapters exist
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from astra_serve.adapters.clock import Clock
from astra_serve.adapters.events import Events
from astra_serve.adapters.fleet import Fleet
from astra_serve.adapters.schedule import Residence
from astra_serve.adapters.version import Alias, Version
from astra_serve.document.keys import Key, Keys, Tenant, TenantLimits, hash_of
from astra_serve.gateway import request as requests
from astra_serve.gateway.body import MAX_BODY, BodyLimit
from astra_serve.gateway.middleware import App, Gateway, Subscribers
from astra_serve.gateway.tenancy.authentication import Authentication
from astra_serve.gateway.tenancy.keyring import Keyring
from astra_serve.gateway.tenancy.places import Places
from astra_serve.gateway.tenancy.quota.station import Quota
from astra_serve.gateway.tenancy.quota.store import MemoryStore
from astra_serve.gateway.tenancy.station import OPEN_STATIONS, Stations
from astra_serve.observe.ledger import Ledger
from astra_serve.observe.ledger_file import LedgerFile
from benchmarks import report

SEED, TENANTS, KEYS, PLACES = 0, 1000, 10, 256
TURNS = {"plain": 1000, "tenant": 1000, "hidden": 100, "absent": 100}  # requests of a turn, by case
TARGETS = {"added_us": 200}
ANSWER = json.dumps({"choices": [{"text": "x" * 64}]}).encode()
console = Console()


class ResidentEverywhere:
    """Stands in for the engine's memory: every version is there."""

    @asynccontextmanager
    async def lease(self, version: Version, *_: Any, **__: Any) -> AsyncIterator[Residence]:
        """Yield a residence at once."""
        yield Residence(version)

    def keep(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Contestant:
    """A gateway, the key and the model of its next request, and the status of its answers."""

    app: App
    pick: Callable[[], tuple[str, str]]
    status: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--requests", type=int, default=100_000, help="of the first two cases (default: 100,000)")
    parser.add_argument("--quick", action="store_true", help="smoke run: 5,000 requests")
    args = parser.parse_args()
    number, env = 5_000 if args.quick else args.requests, report.environment(SEED)
    with tempfile.TemporaryDirectory() as folder:
        times = asyncio.run(measure(Path(folder), max(1, number // TURNS["plain"])))
    cases = [{"case": name, **_quantiles_us(times[name]), "requests": len(times[name])} for name in TURNS]
    found = {f"{case['case']}_us": case["p50_us"] for case in cases}
    summary = {**found, "added_us": found["tenant_us"] - found["plain_us"], "engine": "stub", "targets": TARGETS}
    report.write(args.out, summary, cases, env)
    show(cases, summary)
    return 0


async def measure(folder: Path, turns: int) -> dict[str, list[float]]:
    """Return the seconds of each request, by case; each case takes `turns` turns, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in TURNS}
    contestants = build(folder)
    for turn in track(range(turns + 1), "measuring", console=console, transient=True):
        for name, number in TURNS.items():
            seconds = [await _ask(contestants[name]) for _ in range(number)]
            found[name] += seconds if turn else []
    return found


def build(folder: Path) -> dict[str, Contestant]:
    """Return the contestants; the ledger's file is in `folder`."""
    dice, secrets = random.Random(SEED), [[f"key {n} {k}" for k in range(KEYS)] for n in range(TENANTS)]
    fleet = Fleet("base", ResidentEverywhere(), Events())  # type: ignore[arg-type]
    for number in range(TENANTS):
        fleet.point(f"team{number}/a", Alias(Version(f"team{number}/a", f"sha256:{number:064x}")), 1)
    plain, keyring = Keyring([]), Keyring([], follows=True)
    keyring.replace(Keys(tenants=[_tenant(number, own) for number, own in enumerate(secrets)]))
    ledger = Ledger(LedgerFile(folder), fleet, Clock())
    stations = Stations(quota=Quota(MemoryStore()).station, place=Places(PLACES).place)
    without = _gateway(fleet, plain, OPEN_STATIONS, Subscribers(ended=[ledger.count]))
    with_tenants = _gateway(fleet, keyring, stations, Subscribers(ended=[ledger.count]))

    def pick(other: int = 0, adapter: str = "a") -> Callable[[], tuple[str, str]]:
        def one() -> tuple[str, str]:
            number = dice.randrange(TENANTS)
            return dice.choice(secrets[number]), f"team{(number + other) % TENANTS}/{adapter}"

        return one

    return {
        "plain": Contestant(without, pick(), 200),
        "tenant": Contestant(with_tenants, pick(), 200),
        "hidden": Contestant(with_tenants, pick(other=1), 404),
        "absent": Contestant(with_tenants, pick(other=1, adapter="b"), 404),
    }


def _tenant(number: int, secrets: list[str]) -> Tenant:
    limits = TenantLimits(
        requests_per_minute=10**6, tokens_per_minute=10**9, tokens_per_day=10**11, requests_at_a_time=1000
    )
    keys = [Key(hash=hash_of(secret)) for secret in secrets]
    return Tenant(name=f"team{number}", keys=keys, adapters=[f"team{number}/*"], limits=limits)


def _gateway(fleet: Fleet, keyring: Keyring, stations: Stations, subscribers: Subscribers) -> App:
    async def engine(_scope: Any, _receive: Any, send: Any) -> None:
        """Answer at once, as if 20 tokens had been computed."""
        request = requests.current.get()
        assert request is not None
        request.prompt_tokens, request.output_tokens = 4, 16
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": ANSWER})

    async def abort(_: set[str]) -> None:
        raise AssertionError("the stub computes nothing that could be aborted")

    gateway = Gateway(engine, fleet, subscribers, abort=abort, serves=lambda _: True, stations=stations)
    return Authentication(BodyLimit(gateway, MAX_BODY), keyring)


async def _ask(contestant: Contestant) -> float:
    """Return the seconds of one request."""
    key, model = contestant.pick()
    body = json.dumps({"model": model, "prompt": "How many rows?", "max_tokens": 16}).encode()
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    statuses: list[int] = []

    async def receive() -> Any:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    began = time.perf_counter()
    await contestant.app(scope, receive, send)
    seconds = time.perf_counter() - began
    if statuses != [contestant.status]:
        raise RuntimeError(f"a request for {model} was answered by {statuses}")
    return seconds


def _quantiles_us(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_us": round(1e6 * cuts[49], 1), "p99_us": round(1e6 * cuts[98], 1)}


def show(cases: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    table = Table("", "median", "p99", title=f"{TENANTS} tenants with {KEYS} keys each; microseconds of the gateway")
    for case in cases:
        table.add_row(case["case"], f"{case['p50_us']:.0f}", f"{case['p99_us']:.0f}")
    table.add_row("added by tenants", f"{summary['added_us']:.0f}", "")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
