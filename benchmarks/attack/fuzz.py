"""schemathesis on the OpenAPI documents of both ports; `make attack` installs it beside, at a pinned version."""

import re
import subprocess
from pathlib import Path

from benchmarks.attack.target import Target

CHECKS = "not_a_server_error"


def attack(target: Target, program: Path, seconds: int) -> None:
    public = ["--exclude-path", "/metrics"]  # /events may follow without end, /drain is for operators
    private = ["-H", f"Authorization: Bearer {target.token}", "--exclude-path", "/drain", "--exclude-path", "/events"]
    for label, url, options in (("public", target.server.url, public), ("admin", target.admin_url, private)):
        report = target.folder / f"schemathesis-{label}.json"
        command = [
            str(program.absolute()),
            "run",
            f"{url}/openapi.json",
            "--url",
            url,
            "--checks",
            CHECKS,
            "--no-color",
        ]
        command += ["--max-time", str(seconds), "--workers", "4", "--seed", "0", "--continue-on-failure", "--no-shrink"]
        command += ["--report", "json", "--report-json-path", str(report), "--suppress-health-check", "all", *options]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds + 300, cwd=target.folder
        )
        (target.folder / f"schemathesis-{label}.log").write_text(done.stdout + done.stderr)
        cases = re.search(r"([\d,]+) generated", done.stdout)
        target.note("fuzz", f"{label}: {cases[1] if cases else 0} generated requests", _fault(done.stdout))
    target.check_neighbours("fuzz")


def _fault(text: str) -> str | None:
    """Return what schemathesis found; its own errors ("Runtime Error") are none of the server's."""
    if "generated" not in text:
        return f"it has not run: {text[-300:]}"
    found = re.findall(r"\d+ failed|Network Error: \d+|\[5\d\d\] .*", text)
    return ", ".join(found[:6]) or None
