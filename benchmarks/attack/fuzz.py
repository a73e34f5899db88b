"""schemathesis on the OpenAPI documents of both ports; `make attack` installs it beside, at a pinned version."""

import json
import re
import subprocess
from pathlib import Path

from benchmarks.attack.target import Target

CHECKS = "not_a_server_error"


def attack(target: Target, program: Path, seconds: int) -> None:
    public = ["--exclude-path", "/metrics"]
    private = ["-H", f"Authorization: Bearer {target.token}", "--exclude-path", "/drain"]
    for label, url, options in (("public", target.server.url, public), ("admin", target.admin_url, private)):
        report = target.folder / f"schemathesis-{label}.json"
        command = [str(program), "run", f"{url}/openapi.json", "--url", url, "--checks", CHECKS, "--no-color"]
        command += ["--max-time", str(seconds), "--workers", "4", "--seed", "0", "--continue-on-failure", "--no-shrink"]
        command += ["--report", "json", "--report-json-path", str(report), "--suppress-health-check", "all", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 300)
        (target.folder / f"schemathesis-{label}.log").write_text(done.stdout + done.stderr)
        cases = re.search(r"([\d,]+) generated", done.stdout)
        tried = cases[1] if cases else "0"
        fault = None if done.returncode == 0 else _first(done.stdout) or done.stderr[-300:] or str(done.returncode)
        target.note("fuzz", f"{label}: {tried} generated requests", fault)
    target.check_neighbours("fuzz")


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*(- |\[\d{3}\])", line)]
    return json.dumps(lines[:6])
