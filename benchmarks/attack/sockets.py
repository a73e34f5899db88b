"""What HTTP clients do not send: endless headers, half requests, many idle connections, disconnects."""

import contextlib
import socket
import time

import httpx

from benchmarks.attack.target import Target

POST = b"POST /tokenize HTTP/1.1\r\nHost: x\r\n"
IDLE, IDLE_S = 300, 3.0  # connections, and the time for which they stay
MOST_HEADERS = 2**20  # bytes that a server may take before it refuses


def attack(target: Target) -> None:
    public, admin = httpx.URL(target.server.url).port or 80, target.admin_port
    for label, port in (("public", public), ("admin", admin)):
        target.attempt("sockets", f"{label}: endless headers", lambda p=port: endless_headers(p))
        target.attempt("sockets", f"{label}: one endless header", lambda p=port: endless_header(p))
        target.attempt("sockets", f"{label}: {IDLE} idle connections", lambda p=port: idle(target, p))
        for name, text in {
            "no HTTP": b"\x00\xff\x16\x03\x01",
            "HTTP/9.9": b"GET / HTTP/9.9\r\n\r\n",
            "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            "negative length": POST + b"Content-Length: -5\r\n\r\n",
            "a chunk of 2**62": POST + b"Transfer-Encoding: chunked\r\n\r\n3fffffffffffffff\r\n",
            "half a body": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{",
            "an upgrade": b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        }.items():
            target.attempt("sockets", f"{label}: {name}", lambda p=port, t=text: send(p, t))
    for number in range(20):
        target.attempt("sockets", f"a stream that is left, {number}", lambda: left_stream(target))


def send(port: int, text: bytes) -> str | None:
    """Send a text and hang up; whatever the server answers is right, as long as it is no 500 and no 101."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(text)
        sock.settimeout(1)
        with contextlib.suppress(OSError):
            status = sock.recv(100).split(b" ")[1:2]
            return f"answers {status[0].decode()}" if status in ([b"500"], [b"101"]) else None
    return None


def endless_headers(port: int) -> str | None:
    return _endless(port, lambda number: f"X-{number}: {'a' * 200}\r\n".encode())


def endless_header(port: int) -> str | None:
    return _endless(port, lambda number: b"X-One: " if not number else b"a" * 4096)


def _endless(port: int, part) -> str | None:  # type: ignore[no-untyped-def]
    """Send headers without end; the server must refuse them, and may drop what comes until the client has read that."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
            sent, number = 0, 0
            while sent < MOST_HEADERS:
                sock.sendall(part(number))
                sent, number = sent + len(part(number)), number + 1
        try:
            answer = sock.recv(100)
        except ConnectionError:
            return None
        except TimeoutError:
            return f"takes {MOST_HEADERS} bytes of headers"
        return None if b" 431 " in answer or not answer else f"answers {answer[:30]!r}"


def idle(target: Target, port: int) -> str | None:
    """Open connections that say nothing; the server must answer others meanwhile."""
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        time.sleep(IDLE_S)
        return target.harm()


def left_stream(target: Target) -> str | None:
    """Start a long stream, and leave after the first line."""
    body = {"model": "sql", "prompt": "Table a (b, c)", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{target.server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    return None
