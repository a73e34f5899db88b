"""`astra-serve adapters ...`: the client of the admin API, for people and (with --json) for scripts."""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from astra_serve.client import replicas, replicas_cli
from astra_serve.document import desired
from astra_serve.environment import ADMIN_TOKEN, ADMIN_URL, admin_token
from astra_serve.errors import ServeError

DEFAULT_URL = "http://127.0.0.1:8001"
_POLL_S = 0.3


def main(argv: list[str]) -> int:
    """Run a command; return 0, 1 when a server refused or an adapter failed, 2 for bad input or without an answer.

    With several servers it is 1 in these cases, and when the servers differ.
    """
    args = _parser().parse_args(argv, argparse.Namespace(json=False, timeout=600.0, before=[], after=[]))
    if args.command == "schema":
        print(json.dumps(desired.json_schema(), indent=2))
        return 0
    token = admin_token()
    if not token or not token.isascii() or not token.isprintable():
        print(f"astra-serve adapters: the admin token, one line of ASCII: put it into {ADMIN_TOKEN}", file=sys.stderr)
        return 2
    args.url = [*args.before, *args.after] or os.environ.get(ADMIN_URL, "").replace(",", " ").split() or [DEFAULT_URL]
    of_several = args.command in ("status", "prepare", "rollout")
    wanted = _wanted(args) if args.command in ("publish", "prepare", "rollout") else {}
    try:
        if wanted:
            desired.entry({"name": args.name, **wanted})
        if args.command == "canary" and [args.end] * 2 != [args.source is None, args.weight is None]:
            raise ServeError("a canary needs SOURCE and WEIGHT; --end ends it")
        if args.command == "canary" and not args.end:
            desired.entry({"name": args.name, "source": "x", "canary": {"version": args.source, "weight": args.weight}})
        if args.command == "status":
            args.expected = _expected(args.expected)
        for url in args.url:
            replicas.admin_url(url)
        if len(args.url) > 1 and not of_several:
            raise ServeError(f"{args.command} asks one server: give one --url")
    except ServeError as error:
        print(f"astra-serve adapters: {error}", file=sys.stderr)
        return 2
    if of_several:
        try:
            return replicas_cli.run(args, wanted, token)
        except ServeError as error:
            print(f"astra-serve adapters: {error}", file=sys.stderr)
            return 1
    (url,) = args.url
    headers = {"Authorization": f"Bearer {token}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=args.timeout) as client:
            if args.command == "events" and args.follow:
                return _follow(client, args)
            answer = _with_progress(client, args) if args.command == "publish" else _ask(client, args)
    except httpx.HTTPError as error:
        print(f"astra-serve adapters: {url} does not answer: {error}", file=sys.stderr)
        return 2
    try:
        content = answer.json()
    except ValueError:
        content = {"error": {"message": f"{url} answers with {answer.status_code}: is it the admin port?"}}
    if args.json:
        print(json.dumps(content, indent=2))
    elif answer.is_success:
        _show(content)
    if not answer.is_success:
        message = content.get("error", {}).get("message") or json.dumps(content.get("detail", content))
        print(f"astra-serve adapters: {message}", file=sys.stderr)
    return 0 if answer.is_success else 1


def _ask(client: httpx.Client, args: argparse.Namespace) -> httpx.Response:
    match args.command:
        case "list":
            return client.get("/adapters")
        case "events":
            return client.get("/events")
        case "drain":
            return client.request("DELETE" if args.end else "POST", "/drain")
        case "get":
            return client.get(f"/adapters/{args.name}")
        case "remove":
            return client.delete(f"/adapters/{args.name}")
        case "publish":
            return client.put(f"/adapters/{args.name}", json=_wanted(args))
        case "rollback":
            return client.post(f"/adapters/{args.name}/rollback", json={"digest": args.digest} if args.digest else {})
        case "canary":
            if args.end:
                return client.delete(f"/adapters/{args.name}/canary")
            return client.post(f"/adapters/{args.name}/canary", json={"source": args.source, "weight": args.weight})
        case command:
            return client.post(f"/adapters/{args.name}/{command}")


def _wanted(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that describe the version that is to be served."""
    given = {key: getattr(args, key) for key in ("source", "digest", "required", "pin", "allow_no_effect")}
    return {key: value for key, value in given.items() if value is not None}


def _expected(words: list[str]) -> dict[str, str]:
    """Return the digest of each name. Raises ServeError."""
    for word in words:
        if not re.fullmatch(f"{desired.NAME}={desired.DIGEST}", word):
            raise ServeError(f"{word!r} is not NAME=sha256:..., with the digest that `prepare` prints")
    return dict(word.split("=", 1) for word in words)


def _with_progress(client: httpx.Client, args: argparse.Namespace) -> httpx.Response:
    """Publish, and show meanwhile how far the adapter is."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(1) as pool, Status(f"{args.name}: requested", console=console) as line:
        asked: Future[httpx.Response] = pool.submit(_ask, client, args)
        while not asked.done():
            time.sleep(_POLL_S)
            now = client.get(f"/adapters/{args.name}")
            if now.is_success and console.is_terminal:
                adapter = now.json()
                line.update(f"{args.name}: {(adapter.get('publishing') or adapter)['state']}")
        return asked.result()


def _follow(client: httpx.Client, args: argparse.Namespace) -> int:
    """Show events until Ctrl-C, or until the server ends."""
    try:
        with client.stream("GET", "/events", params={"follow": True}, timeout=None) as answer:
            if not answer.is_success:
                print(f"astra-serve adapters: {client.base_url} answers with {answer.status_code}", file=sys.stderr)
                return 1
            for line in answer.iter_lines():
                print(line, flush=True) if args.json else _show_event(Console(), json.loads(line))
    except KeyboardInterrupt:
        pass
    return 0


def _show_event(console: Console, event: dict[str, Any]) -> None:
    when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    reason = f": {event['reason']}" if event["reason"] else ""
    took = f" ({sum(event['seconds'].values()):.2f} s)" if event["seconds"] else ""
    console.print(
        Text(f"{when}  {event['version'] or event['adapter']}  {event['event']}{took}{reason}"), soft_wrap=True
    )


def _show(content: dict[str, Any]) -> None:
    console = Console()
    if "events" in content:
        for event in content["events"]:
            _show_event(console, event)
        return
    if "running" in content:
        state = "drained: not ready" if content["drained"] else "in rotation"
        console.print(f"{state}; {content['running']} requests run")
        return
    adapters = content.get("adapters", [content])
    if fault := content.get("document", {}).get("fault"):
        console.print(Text(f"the document is not followed as it is now: {fault}"), soft_wrap=True)
    table = Table("adapter", "state", "version", "where", "requests", "effect", "previous")
    for adapter in adapters:
        previous, canary = str(len(adapter.get("previous", []))), adapter.get("canary")
        table.add_row(Text(adapter["name"]), Text(_state(adapter)), *_version(adapter.get("version")), previous)
        if canary:
            share = "no request yet" if canary["share"] is None else f"so far {canary['share']:.0%}"
            table.add_row(f"  canary {canary['weight']:.0%}", share, *_version(canary), "")
    console.print(table)
    for adapter in adapters:
        if adapter.get("reason"):
            console.print(Text(f"{adapter['name']}: {adapter['reason']}"), soft_wrap=True)


def _state(adapter: dict[str, Any]) -> str:
    publishing = adapter.get("publishing")
    state = str(adapter["state"])
    return f"{state}, publishing ({publishing['state']})" if publishing and adapter["version"] else state


def _version(version: dict[str, Any] | None) -> list[str]:
    """Return the cells of a version: digest, residency, running requests, effect."""
    if version is None:
        return [""] * 4
    probe = version["probe"]
    effect = f"{probe['effect']:.2f} nats" if probe else ""
    return [version["name"].partition("@")[2], version["residency"], str(version["requests"]), effect]


def _everywhere(urls: str) -> argparse.ArgumentParser:
    """Return the options that may stand before the command as well as after it; their URLs become `urls`."""
    found = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    found.add_argument(
        "--url",
        action="append",
        dest=urls,
        help=f"the admin port ({ADMIN_URL}, {DEFAULT_URL}); repeated for replicas, or a name with all their addresses",
    )
    found.add_argument("--json", action="store_true", help="what the server answers, for scripts")
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

    def add(name: str, help_: str, *, named: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=help_, parents=[_everywhere("after")])
        if named:
            command.add_argument("name", metavar="NAME")
        return command

    add("list", "All adapters.", named=False)
    add("get", "One adapter.")
    publish = add("publish", "Serve the adapter at SOURCE as NAME; the version before serves until this one is proved.")
    prepare = add("prepare", "Prove the adapter at SOURCE on every replica, and print its digest; none serves it yet.")
    rollout = add(
        "rollout", "Serve the adapter at SOURCE as NAME on every replica once all have proved it, or on none."
    )
    for command in (publish, prepare, rollout):
        command.add_argument(
            "source", metavar="SOURCE", help="a folder, hf://org/repo@revision, any fsspec URL, sha256:..."
        )
        command.add_argument("--digest", help="refuse any other content")
        command.add_argument("--required", action="store_true", default=None, help="a server that starts waits for it")
        command.add_argument("--pin", action="store_true", default=None, help="never evict it")
        command.add_argument("--allow-no-effect", action="store_true", default=None, help="even if it changes nothing")
    rollout.add_argument(
        "--document", metavar="FILE_OR_URL", help="as seen from here (default: where the replicas say that it is)"
    )
    status = add("status", "Whether all replicas serve what the document says; exit 1 when not.", named=False)
    status.add_argument("expected", nargs="*", metavar="NAME=DIGEST", help="and these versions")
    status.add_argument("--wait", type=float, metavar="S", help="for at most so many seconds until they do")
    rollback = add("rollback", "Serve the version before again.")
    rollback.add_argument("--digest", help="or this one")
    canary = add("canary", "Give a share of the requests to another version.")
    canary.add_argument("source", nargs="?", metavar="SOURCE", help="or sha256:... of a version in the store")
    canary.add_argument("weight", nargs="?", type=float, metavar="WEIGHT", help="above 0 and below 1")
    canary.add_argument("--end", action="store_true", help="end it")
    add("pin", "Never evict it from the engine's memory.")
    add("unpin", "Let it be evicted.")
    add("unload", "Take it out of the engine's memory; its next request loads it again.")
    add("remove", "Serve it no longer.")
    drain = add("drain", "Take this server out of rotation: not ready, but requests are still served.", named=False)
    drain.add_argument("--end", action="store_true", help="put it back")
    events = add("events", "The newest events.", named=False)
    events.add_argument("--follow", action="store_true", help="and the next ones, until Ctrl-C")
    add("schema", "The JSON Schema of the document that --adapters names.", named=False)
    return parser
