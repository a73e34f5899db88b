"""`astra-serve adapters ...`: the client of the admin API, for people and (with --json) for scripts."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.status import Status

from astra_serve.client import calls, exchange, replicas_cli, show
from astra_serve.client.client import DEFAULT_URL, TIMEOUT_S, Client
from astra_serve.client.exchange import Call
from astra_serve.document import desired
from astra_serve.environment import ADMIN_TOKEN, ADMIN_URL
from astra_serve.errors import NoAnswer, ServeError

_POLL_S = 0.3
OF_REPLICAS = ("status", "prepare", "rollout")
VERSION = ("source", "digest", "required", "pin", "allow_no_effect")  # the options that describe a version


def main(argv: list[str]) -> int:
    """Run a command; return 0, 1 when a server refused or an adapter failed, 2 for bad input or without an answer.

    With several servers it is 1 in these cases, and when the servers differ.
    """
    args = _parser().parse_args(argv, argparse.Namespace(json=False, timeout=TIMEOUT_S, before=[], after=[]))
    if args.command == "schema":
        print(json.dumps(desired.json_schema(), indent=2))
        return 0
    args.url = [*args.before, *args.after] or os.environ.get(ADMIN_URL, "").replace(",", " ").split() or [DEFAULT_URL]
    try:
        token = exchange.checked_token(None)
        call = _checked(args)
    except ServeError as error:
        return _failed(error, 2)
    try:
        if args.command in OF_REPLICAS:
            return replicas_cli.run(
                args, {key: value for key, value in _wanted(args).items() if value is not None}, token
            )
        with Client(args.url[0], token, args.timeout) as client:
            return _follow(client, args) if call is None else _ask(client, args, call)
    except NoAnswer as error:
        return _failed(error, 2)
    except ServeError as error:
        return _failed(error, 1)


def _failed(reason: object, status: int) -> int:
    print(f"astra-serve adapters: {reason}", file=sys.stderr)
    return status


def _checked(args: argparse.Namespace) -> Call[Any] | None:
    """Return the call of a command for one server, None for one that makes others.

    Raises ServeError where the arguments make no sense.
    """
    for url in args.url:
        exchange.admin_url(url)
    if args.command in ("prepare", "rollout"):
        args.source = calls.located(args.source)
        calls.prepare(args.name, **_wanted(args))
    elif args.command == "status":
        for word in args.expected:
            if not re.fullmatch(f"{desired.NAME}={desired.DIGEST}", word):
                raise ServeError(f"{word!r} is not NAME=sha256:..., with the digest that `prepare` prints")
        args.expected = dict(word.split("=", 1) for word in args.expected)
    if args.command in OF_REPLICAS:
        return None
    if len(args.url) > 1:
        raise ServeError(f"{args.command} asks one server: give one --url")
    return None if args.command == "events" and args.follow else _call(args)


def _call(args: argparse.Namespace) -> Call[Any]:
    """Return the call of a command for one server. Raises ServeError."""
    match args.command:
        case "list":
            return calls.listing()
        case "events":
            return calls.events()
        case "drain":
            return calls.undrain() if args.end else calls.drain()
        case "publish":
            return calls.publish(args.name, upload=args.upload, **_wanted(args))
        case "rollback":
            return calls.rollback(args.name, args.digest)
        case "canary":
            if [args.end] * 2 != [args.source is None, args.weight is None]:
                raise ServeError("a canary needs SOURCE and WEIGHT; --end ends it")
            return calls.end_canary(args.name) if args.end else calls.canary(args.name, args.source, args.weight)
        case command:  # get, remove, pin, unpin, unload
            of_a_name: Callable[[str], Call[Any]] = getattr(calls, command)
            return of_a_name(args.name)


def _wanted(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that describe the version that is to be served."""
    return {key: getattr(args, key, None) for key in VERSION}


def _ask(client: Client, args: argparse.Namespace, call: Call[Any]) -> int:
    """Make a call, and show its answer. Raises ServeError."""
    try:
        answer = _with_progress(client, args, call) if args.command == "publish" else client.ask(call)
    except ServeError as error:
        if args.json:
            print(json.dumps({"error": {"message": str(error), "type": type(error).__name__}}, indent=2))
        raise
    if args.json:
        print(json.dumps(asdict(answer), indent=2))
    else:
        show.show(answer)
    return 0


def _with_progress(client: Client, args: argparse.Namespace, call: Call[Any]) -> Any:
    """Publish, and show meanwhile how far the adapter is."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(1) as pool, Status(f"{args.name}: requested", console=console) as line:
        asked = pool.submit(client.ask, call)
        while not asked.done():
            time.sleep(_POLL_S)
            if not console.is_terminal:
                continue
            if call.tar and call.tar.sent < call.tar.size:
                line.update(f"{args.name}: sent {call.tar.sent / 2**20:.1f} of {call.tar.size / 2**20:.1f} MiB")
                continue
            with suppress(ServeError):  # it is not known yet
                now = client.get(args.name)
                line.update(f"{args.name}: {(now.publishing or now).state}")
        return asked.result()


def _follow(client: Client, args: argparse.Namespace) -> int:
    """Show events until Ctrl-C, or until the server ends. Raises ServeError."""
    with suppress(KeyboardInterrupt):
        for event in client.follow():
            print(json.dumps(asdict(event)), flush=True) if args.json else show.event(Console(), event)
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
    publish = add_version("publish NAME", "Serve the adapter at SOURCE as NAME, once it is proved.")
    publish("--upload", action="store_true", help="SOURCE is a folder here: send its files (the server's --upload-to)")
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
