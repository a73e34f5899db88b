"""`astra-serve adapters ...`: the client of the admin API, for people and (with --json) for scripts."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
from rich.console import Console
from rich.status import Status

from astra_serve.client import replicas, replicas_cli, show
from astra_serve.document import desired
from astra_serve.environment import ADMIN_TOKEN, ADMIN_URL, admin_token
from astra_serve.errors import ServeError

DEFAULT_URL = "http://127.0.0.1:8001"
_POLL_S = 0.3
VERSION = ("source", "digest", "required", "pin", "allow_no_effect")


def main(argv: list[str]) -> int:
    """Run a command; return 0, 1 when a server refused or an adapter failed, 2 for bad input or without an answer.

    With several servers it is 1 in these cases, and when the servers differ.
    """
    args = _parser().parse_args(argv, argparse.Namespace(json=False, timeout=600.0, before=[], after=[]))
    if args.command == "schema":
        print(json.dumps(desired.json_schema(), indent=2))
        return 0
    args.url = [*args.before, *args.after] or os.environ.get(ADMIN_URL, "").replace(",", " ").split() or [DEFAULT_URL]
    if getattr(args, "source", None):
        args.source = _absolute(args.source)
    try:
        _check(args)
    except ServeError as error:
        return _failed(error, 2)
    try:
        if args.command in ("status", "prepare", "rollout"):
            return replicas_cli.run(args, _wanted(args), admin_token())
        return _ask_one(args)
    except ServeError as error:
        return _failed(error, 1)
    except httpx.HTTPError as error:
        return _failed(f"{args.url[0]} does not answer: {error}", 2)


def _failed(reason: object, status: int) -> int:
    print(f"astra-serve adapters: {reason}", file=sys.stderr)
    return status


def _absolute(source: str) -> str:
    """Return a source with its path absolute, if it is one: the server runs in another folder."""
    if "://" in source or source.startswith("sha256:"):
        return source
    return os.path.abspath(os.path.expanduser(source))  # noqa: PTH100, PTH111 (links stay as they are)


def _check(args: argparse.Namespace) -> None:
    """Raise ServeError where the arguments or the environment make no sense."""
    token = admin_token()
    if not token or not token.isascii() or not token.isprintable():
        raise ServeError(f"the admin token, one line of ASCII: put it into {ADMIN_TOKEN}")
    if args.command in ("publish", "prepare", "rollout"):
        desired.entry({"name": args.name, **_wanted(args)})
    elif args.command == "canary":
        if [args.end] * 2 != [args.source is None, args.weight is None]:
            raise ServeError("a canary needs SOURCE and WEIGHT; --end ends it")
        canary = None if args.end else {"version": args.source, "weight": args.weight}
        desired.entry({"name": args.name, "source": "x", "canary": canary})
    elif args.command == "status":
        for word in args.expected:
            if not re.fullmatch(f"{desired.NAME}={desired.DIGEST}", word):
                raise ServeError(f"{word!r} is not NAME=sha256:..., with the digest that `prepare` prints")
        args.expected = dict(word.split("=", 1) for word in args.expected)
    for url in args.url:
        replicas.admin_url(url)
    if len(args.url) > 1 and args.command not in ("status", "prepare", "rollout"):
        raise ServeError(f"{args.command} asks one server: give one --url")


def _ask_one(args: argparse.Namespace) -> int:
    """Ask one server, and show its answer. Raises httpx.HTTPError."""
    headers = {"Authorization": f"Bearer {admin_token()}"}
    with httpx.Client(base_url=args.url[0], headers=headers, timeout=args.timeout) as client:
        if args.command == "events" and args.follow:
            return _follow(client, args)
        answer = _with_progress(client, args) if args.command == "publish" else _ask(client, args)
    try:
        content = answer.json()
    except ValueError:
        content = {"error": {"message": f"{args.url[0]} answers with {answer.status_code}: is it the admin port?"}}
    if args.json:
        print(json.dumps(content, indent=2))
    elif answer.is_success:
        show.show(content)
    if answer.is_success:
        return 0
    return _failed(content.get("error", {}).get("message") or json.dumps(content), 1)


def _ask(client: httpx.Client, args: argparse.Namespace) -> httpx.Response:
    command, adapter = args.command, f"/adapters/{getattr(args, 'name', '')}"
    method, path, body = {
        "list": ("GET", "/adapters", None),
        "events": ("GET", "/events", None),
        "get": ("GET", adapter, None),
        "remove": ("DELETE", adapter, None),
        "publish": ("PUT", adapter, _wanted(args)),
        "rollback": ("POST", f"{adapter}/rollback", {"digest": getattr(args, "digest", None)}),
        "drain": ("POST", "/drain", None),
        "canary": ("POST", f"{adapter}/canary", _wanted(args, "source", "weight")),
    }.get(command, ("POST", f"{adapter}/{command}", None))
    if getattr(args, "end", False):
        method, body = "DELETE", None
    return client.request(method, path, json=body)


def _wanted(
    args: argparse.Namespace,
    *keys: str,
    of: tuple[str, ...] = ("source", "digest", "required", "pin", "allow_no_effect"),
) -> dict[str, Any]:
    """Return the options that describe the version that is to be served."""
    given = {key: getattr(args, key, None) for key in keys or of}
    return {key: value for key, value in given.items() if value is not None}


def _with_progress(client: httpx.Client, args: argparse.Namespace) -> httpx.Response:
    """Publish, and show meanwhile how far the adapter is."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(1) as pool, Status(f"{args.name}: requested", console=console) as line:
        asked: Future[httpx.Response] = pool.submit(_ask, client, args)
        while not asked.done():
            time.sleep(_POLL_S)
            now = client.get(f"/adapters/{args.name}")
            if now.is_success and console.is_terminal:
                line.update(f"{args.name}: {(now.json()['publishing'] or now.json())['state']}")
        return asked.result()


def _follow(client: httpx.Client, args: argparse.Namespace) -> int:
    """Show events until Ctrl-C, or until the server ends."""
    with suppress(KeyboardInterrupt), client.stream("GET", "/events", params={"follow": True}, timeout=None) as answer:
        if not answer.is_success:
            return _failed(f"{client.base_url} answers with {answer.status_code}", 1)
        for line in answer.iter_lines():
            print(line, flush=True) if args.json else show.event(Console(), json.loads(line))
    return 0


def _everywhere(urls: str) -> argparse.ArgumentParser:
    """Return the options that may stand before the command as well as after it; their URLs become `urls`."""
    found = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    url = f"the admin port ({ADMIN_URL}, {DEFAULT_URL}); repeated for replicas, or a name with all their addresses"
    found.add_argument("--url", action="append", dest=urls, metavar="URL", help=url)
    found.add_argument("--json", action="store_true", help="print the server's answer as JSON, for scripts")
    found.add_argument("--timeout", type=float, metavar="S", help="seconds to wait (default: 600)")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-serve adapters",
        description="Show and change the adapters of a running server.",
        epilog=f"The admin token is read from {ADMIN_TOKEN}.",
        parents=[_everywhere("before")],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(words: str, help_: str) -> Callable[..., argparse.Action]:
        """Add a command with its NAME, if it has one, and return the function that adds its options."""
        name, *rest = words.split()
        command = commands.add_parser(name, help=help_, description=help_, parents=[_everywhere("after")])
        if rest:
            command.add_argument("name", metavar="NAME")
        return command.add_argument

    def add_version(words: str, help_: str) -> Callable[..., argparse.Action]:
        option, flag = add(words, help_), {"action": "store_true", "default": None}
        kinds = "a folder that the server sees, hf://org/repo@revision, any fsspec URL, sha256:..."
        option("source", metavar="SOURCE", help=kinds)
        option("--digest", help="refuse any other content")
        option("--required", **flag, help="a server that starts waits for it")
        option("--pin", **flag, help="never evict it")
        option("--allow-no-effect", **flag, help="even if it changes nothing")
        return option

    add("list", "Show all adapters.")
    add("get NAME", "Show one adapter.")
    add_version("publish NAME", "Serve the adapter at SOURCE as NAME, once it is proved.")
    add_version("prepare NAME", "Prove the adapter at SOURCE on every replica, and print its digest.")
    rollout = add_version("rollout NAME", "Serve the adapter at SOURCE on every replica, or restore the old entry.")
    rollout("--document", metavar="FILE_OR_URL", help="as seen from here (default: the place that the replicas report)")
    status = add("status", "Show whether all replicas serve what the document says; exit 1 when not.")
    status("expected", nargs="*", metavar="NAME=DIGEST", help="and these versions")
    status("--wait", type=float, metavar="S", help="wait at most so many seconds until they do")
    add("rollback NAME", "Serve the version before again.")("--digest", help="or this one")
    canary = add("canary NAME", "Give a share of the requests to another version; a `user` stays with one.")
    canary("source", nargs="?", metavar="SOURCE", help="or sha256:... of a version in the store")
    canary("weight", nargs="?", type=float, metavar="WEIGHT", help="above 0 and below 1")
    canary("--end", action="store_true", help="end it")
    add("pin NAME", "Never evict it from the engine's memory.")
    add("unpin NAME", "Let it be evicted.")
    add("unload NAME", "Evict it from the engine's memory; its next request loads it again.")
    add("remove NAME", "Serve it no longer.")
    drain = add("drain", "Take this server out of rotation: not ready, but requests are still served.")
    drain("--end", action="store_true", help="put it back")
    add("events", "Show the newest events.")("--follow", action="store_true", help="and the next ones, until Ctrl-C")
    add("schema", "Print the JSON Schema of the document that --adapters names.")
    return parser
