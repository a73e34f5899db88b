"""Killed in the middle of a publication: is the desired state reached after the restart, and nothing half-visible?

    python -m benchmarks.restart --out FILE.json [--rounds 2] [--adapters DIR DIR]

The server serves one of two adapters. The other is published over it, from a slow HTTP server, and at each state of its
way (fetching, verifying, loading, probing, serving) the server is killed with SIGKILL as soon as it says so. Its
engine's processes must end with it. Then it is started again with the same document and store, and must serve what the
document says: the digest and the answers of that version, with no staged files and no version that is not whole.

A kill comes some milliseconds after the state was entered; the log says which one it hit. Without --adapters two are
trained first (a minute).
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
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from astra_serve.adapters.store import version_digest
from astra_serve.document import desired
from benchmarks import demo, report
from benchmarks.load import ask
from benchmarks.server import Server, astra_serve, free_port
from benchmarks.swap import PROMPTS, TASKS, TOKENS
from trainer.embedded import tasks

SEED, NAME, TOKEN = 0, "killed", "benchmark"
STATES = ("fetching", "verifying", "loading", "probing", "serving")
SLOW_S = 0.1  # per file of an adapter
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rounds", type=int, default=2, help="kills at each state")
    parser.add_argument("--quick", action="store_true", help="one kill: shows that it runs")
    parser.add_argument("--adapters", nargs=2, type=Path, metavar="DIR", help="two LoRAs of the embedded base")
    args = parser.parse_args()
    env = report.environment(SEED)
    os.environ["ASTRA_ADMIN_TOKEN"] = TOKEN
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = args.adapters or _train(folder)
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
    """Kill a server once in each of `states`, and look at what the next one serves."""
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
                    cases[-1]["wrong"] = look(api, server, document, folder / "store", known)
                    cases[-1]["ready_s"] = time.monotonic() - began
                if state is None:
                    break
                serving = desired.parse(document.read_text(), "x").adapters[0].digest
                other = next(digest for digest in sources if digest != serving)
                outlived = kill_at(state, api, server, sources[other])
            said = [line for line in server.log.read_text().splitlines() if f'"adapter": "{NAME}"' in line]
            cases.append({"wanted": state, "hit": json.loads(said[-1])["event"], "outlived": outlived})
    return cases


def kill_at(state: str, api: httpx.Client, server: Server, source: str) -> int:
    """Publish `source`, kill the server when it says that it is in `state`; return how many processes outlived it."""
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]

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
    _, alive = psutil.wait_procs(family, timeout=10)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    return len(alive)


def look(api: httpx.Client, server: Server, document: Path, store: Path, known: dict[str, list[str]]) -> list[str]:
    """Return what is not as the document says."""
    wanted = desired.parse(document.read_text(), "x").adapters[0].digest
    for _ in range(600):
        found = api.get(f"/adapters/{NAME}").json()
        if found.get("state") in ("serving", "failed"):
            break
        time.sleep(0.1)
    wrong = []
    if found.get("state") != "serving" or found["version"]["digest"] != wanted:
        wrong.append(f"it is {found}, and should serve {wanted}")
    elif asyncio.run(_answers(server)) != known[found["version"]["digest"]]:
        wrong.append("it does not answer as its version does")
    wrong += [f"{path} is staged" for path in (store / "staging").iterdir()]
    wrong += [f"{p} is not whole" for p in (store / "versions").iterdir() if version_digest(p) != f"sha256:{p.name}"]
    return wrong


async def _answers(server: Server) -> list[str]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        return [(await ask(client, NAME, prompt, TOKENS, stream=False)).text for prompt in PROMPTS]


@contextlib.contextmanager
def slow_files(folder: Path, adapters: list[Path]) -> Iterator[list[str]]:
    """Serve copies of `adapters` over HTTP, slowly, and yield their URLs."""
    folder.mkdir()
    for number, adapter in enumerate(adapters):
        (folder / str(number)).symlink_to(adapter.resolve())

    class Slow(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            time.sleep(SLOW_S)
            with contextlib.suppress(ConnectionError):  # its reader was killed
                super().do_GET()

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield [f"http://127.0.0.1:{server.server_port}/{number}" for number in range(len(adapters))]
    server.shutdown()
    thread.join()
    server.server_close()


def _train(folder: Path) -> list[Path]:
    tasks.write(folder / "data")
    return [demo.train_and_convert(task, folder) for task in TASKS]


def show(cases: list[dict[str, Any]]) -> None:
    names = ("killed at", "hit", "processes left behind", "ready again", "what was wrong then")
    table = Table(*names, title="SIGKILL in a publication")
    for case in cases:
        wrong = "; ".join(case["wrong"]) or "nothing"
        table.add_row(case["wanted"], case["hit"], str(case["outlived"]), f"{case['ready_s']:.0f} s", wrong)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
