"""The server that is attacked, its good neighbours, and what counts as harm."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import Server
from tests.support.swap import PROMPTS

LIVE_S = 5.0  # for /livez to answer while an attack runs
TOKENS = 4


@dataclass(frozen=True)
class Tried:
    """One try, and the harm that it did."""

    stage: str
    name: str
    fault: str | None


@dataclass
class Target:
    """A running server, with the answers that its good adapters gave before the attack."""

    server: Server
    admin_port: int
    token: str
    document: Path
    good: list[Path]  # folders of the adapters that serve as NEIGHBOURS
    folder: Path  # for files of the attack
    tried: list[Tried] = field(default_factory=list)
    _known: dict[tuple[str, str], str] = field(default_factory=dict)

    NEIGHBOURS = ("base", "sql", "intent")

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    def admin(self, timeout: float = 60) -> httpx.Client:
        """Return a client of the admin API with its token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.admin_url, headers=headers, timeout=timeout)

    def note(self, stage: str, name: str, fault: str | None) -> None:
        """Note a try; a server that has ended, or does not answer any more, is a fault of it, too."""
        self.tried.append(Tried(stage, name, fault or self.harm()))

    def attempt(self, stage: str, name: str, act: Callable[[], str | None]) -> None:
        """Try `act`, which returns a fault or None."""
        try:
            fault = act()
        except Exception as error:  # of the attack's own clients: a fault of the server, until it is looked at
            fault = f"{type(error).__name__}: {error}"
        self.note(stage, name, fault)

    def harm(self) -> str | None:
        """Return what is wrong with the server as a whole."""
        if self.server.process.poll() is not None:
            return f"the server has ended with {self.server.process.returncode}"
        began = time.monotonic()
        try:
            answer = httpx.get(f"{self.server.url}/livez", timeout=LIVE_S)
        except httpx.HTTPError as error:
            return f"/livez: {type(error).__name__} after {time.monotonic() - began:.1f} s"
        return None if answer.is_success else f"/livez: {answer.status_code}"

    def check_neighbours(self, stage: str) -> None:
        """Ask all neighbours again: each answer must be the one from before the attack."""
        with httpx.Client(base_url=self.server.url, timeout=120) as http:
            for model in self.NEIGHBOURS:
                for prompt in PROMPTS:
                    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
                    answer = http.post("/v1/completions", json=body)
                    text = answer.json()["choices"][0]["text"] if answer.is_success else answer.text
                    fault = None if self._known.setdefault((model, prompt), text) == text else f"answers {text[:80]!r}"
                    if not answer.is_success:
                        fault = f"{answer.status_code} {answer.text[:80]}"
                    self.note(stage, f"neighbour {model}", fault)


def openai_error(answer: httpx.Response) -> str | None:
    """Return a fault unless the answer is a success, or an error in OpenAI's form that is no 500."""
    if answer.is_success:
        return None
    text = answer.text
    if answer.status_code >= 500 and answer.status_code != 503:
        return f"{answer.status_code} {text[:200]}"
    try:
        error = answer.json()["error"]
        wrong = not (isinstance(error, dict) and isinstance(error["message"], str) and {"type", "code"} <= set(error))
    except (ValueError, KeyError, TypeError):
        wrong = True
    if wrong:
        return f"{answer.status_code} is not in OpenAI's form: {text[:200]}"
    return "its message has a traceback" if "Traceback" in text else None
