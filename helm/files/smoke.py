"""Check a server: its models, an answer of the base and of one adapter, a stream. A failure is one line and status 1.

python3 smoke.py http://HOST:PORT [SECONDS]

SECONDS is the time to wait until the server is ready (default: 0). The API key, if any, is in VLLM_API_KEY.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

PROMPT = {"prompt": "The", "max_tokens": 4, "temperature": 0}


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    """Send a request and return the body of the answer. Raises OSError; HTTPError has the answer of the server."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return str(answer.read().decode())


def wait(server: str, seconds: float) -> None:
    """Wait at most `seconds` until the server is ready. Raises OSError; HTTPError has the reasons of the server."""
    end = time.monotonic() + seconds
    while True:
        try:
            ask(f"{server}/readyz")
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(2)


def main(server: str) -> None:
    """Run every check. Raises AssertionError with the fault."""
    models = json.loads(ask(f"{server}/v1/models"))["data"]
    assert models, "the server lists no model"
    base, *adapters = (model["id"] for model in models)
    print(f"models: {base} and {len(adapters)} adapters")
    for model in (base, *adapters[:1]):
        answer = json.loads(ask(f"{server}/v1/completions", {"model": model, **PROMPT}))
        assert answer["usage"]["completion_tokens"] > 0, f"the answer of {model} is empty"
        served = answer["model"].partition("@")[0]
        assert served == model, f"the request was for {model}, the answer is from {answer['model']}"
        print(f"{model}: answered by {answer['model']}")
    stream = ask(f"{server}/v1/completions", {"model": (adapters or [base])[0], "stream": True, **PROMPT})
    events = [line for line in stream.splitlines() if line.startswith("data: ")]
    assert len(events) > 1, "the stream is empty"
    assert events[-1] == "data: [DONE]", f"the stream ends with {events[-1]}"
    print(f"stream: {len(events) - 1} events")


if __name__ == "__main__":
    try:
        url = sys.argv[1].rstrip("/")
        wait(url, float(sys.argv[2]) if len(sys.argv) > 2 else 0)
        main(url)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.url} answers with {error.code}: {error.read().decode()[:500]}")
    except (OSError, AssertionError, KeyError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
