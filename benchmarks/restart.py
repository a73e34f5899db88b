"""If the server is killed while it publishes: does the next one serve the desired state, and nothing half-published?

    python -m benchmarks.restart --out FILE.json [--rounds 2] [--adapters DIR DIR]

The server serves one of two adapters. The other one is published over it, from a slow HTTP server. At each state of the
publication (fetching, verifying, loading, probing, serving) the server is killed with SIGKILL as soon as it emits the
event of that state. The processes of its engine must end, too. Then a server is started with the same document and
store. It must serve the digest that the document names, with the answers of that version; the store must hold no staged
files and no version whose bytes differ from its digest.

The kill takes effect some milliseconds after the event; `hit` is the last state in the log. Without --adapters, two
adapters are trained first (a minute).
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from astra_serve.adapters.version_files import version_digest
from astra_serve.document import desired
from benchmarks import report
from tests.support import demo
from tests.support.load import ask
from tests.support.server import Server, astra_serve, free_port
from tests.support.slow_files import slow_files
from tests.support.swap import PROMPTS, TOKENS, train_adapters

SEED, NAME, TOKEN = 0, "killed", "benchmark"
STATES = ("fetching", "verifying", "loading", "probing", "serving")
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=2, help="kills at each state (default: 2)")
    parser.add_argument("--quick", action="store_true", help="smoke run: one kill")
    parser.add_argument("--adapters", nargs=2, type=Path, metavar="DIR", help="two LoRAs of the embedded base")
    args = parser.parse_args()
    env = report.environment(SEED)
    os.environ["ASTRA_ADMIN_TOKEN"] = TOKEN
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = args.adapters or train_adapters(folder)
        with slow_files(folder / "files", adapters) as sources:
            states = ("probing",) if args.quick else STATES * args.rounds
            cases = killed(folder, dict(zip(map(version_digest, adapters), sources, strict=True)), states)
    summary = {
        "kills": len(cases),
        "hit": dict(Counter(case["hit"] for case in cases)),
        "wrong": sum(bool(case["wrong"]) for case in cases),
        "outlived": sum(case["outlived"] for case in cases),
    }
    report.write(args.out, summary, cases, env)
    show(cases)
    return 0


def killed(folder: Path, sources: dict[str, str], states: tuple[str, ...]) -> list[dict[str, Any]]:
    """Kill a server once in each of `states`, and return a case per kill with the faults of the server after it.

    `sources` maps the digest of each version to its URL.
    """
    document, cases, known = folder / "adapters.yaml", [], dict[str, list[str]]()
    for number, state in enumerate(track((*states, None), "killing", console=console, transient=True)):
        admin = free_port()
        options = ["--base", str(demo.BASE), "--adapters", str(document), "--store", str(folder / "store")]
        options += ["--admin-port", str(admin), "--enforce-eager", "--log-format", "json"]
        began = time.monotonic()
        with astra_serve(options, folder / f"{number}.log") as server:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{admin}", headers=headers, timeout=60) as api:
                if number == 0:
                    for digest, source in sources.items():
                        api.put(f"/adapters/{NAME}", json={"source": source}).raise_for_status()
                        known[digest] = asyncio.run(_answers(server))
                else:
                    cases[-1]["wrong"] = faults(api, server, document, folder / "store", known)
                    cases[-1]["ready_s"] = time.monotonic() - began
                if state is None:
                    break
                serving = desired.parse(document.read_text(), "x").adapters[0].digest
                other = next(digest for digest in sources if digest != serving)
                outlived = kill_at(state, api, server, sources[other])
            logged = [line for line in server.log.read_text().splitlines() if f'"adapter": "{NAME}"' in line]
            cases.append({"wanted": state, "hit": json.loads(logged[-1])["event"], "outlived": outlived})
    return cases


def kill_at(state: str, api: httpx.Client, server: Server, source: str) -> int:
    """Publish `source`, kill the server at the event `state`, and return how many child processes survived."""
    process = psutil.Process(server.process.pid)
    processes = [process, *process.children(recursive=True)]

    def publish() -> None:
        with contextlib.suppress(httpx.HTTPError):
            api.put(f"/adapters/{NAME}", json={"source": source})

    with api.stream("GET", "/events", params={"follow": True}) as events:
        lines = events.iter_lines()
        before = len(api.get("/events").json()["events"])
        for _ in range(before):
            next(lines)
        publishing = Thread(target=publish)
        publishing.start()
        while json.loads(next(lines))["event"] != state:
            pass
        process.kill()
    publishing.join()
    _, alive = psutil.wait_procs(processes, timeout=10)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    return len(alive)


def faults(api: httpx.Client, server: Server, document: Path, store: Path, known: dict[str, list[str]]) -> list[str]:
    """Return in which points the server and its store differ from the document; `known` maps digests to answers."""
    wanted = desired.parse(document.read_text(), "x").adapters[0].digest
    for _ in range(600):
        found = api.get(f"/adapters/{NAME}").json()
        if found.get("state") in ("serving", "failed"):
            break
        time.sleep(0.1)
    wrong = []
    if found.get("state") != "serving" or found["version"]["digest"] != wanted:
        wrong.append(f"the adapter is {found}, but the document names {wanted}")
    elif asyncio.run(_answers(server)) != known[found["version"]["digest"]]:
        wrong.append("the answers are not those of the version")
    wrong += [f"{path} is staged" for path in (store / "staging").iterdir()]
    versions = (store / "versions").iterdir()
    wrong += [f"{p} does not match its digest" for p in versions if version_digest(p) != f"sha256:{p.name}"]
    return wrong


async def _answers(server: Server) -> list[str]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return [(await ask(client, NAME, prompt, TOKENS, stream=False)).text for prompt in PROMPTS]


def show(cases: list[dict[str, Any]]) -> None:
    names = ("killed at", "hit", "surviving processes", "ready again", "faults after the restart")
    table = Table(*names, title="SIGKILL during a publication")
    for case in cases:
        wrong = "; ".join(case["wrong"]) or "none"
        table.add_row(case["wanted"], case["hit"], str(case["outlived"]), f"{case['ready_s']:.0f} s", wrong)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
