"""`astra-serve keys`: the keys of tenants in a keys document. It works on the document; servers follow it.

A key is shown once, by `new`, and the document has only its hash: who reads the document cannot use any key.
"""

import argparse
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from astra_serve.client import keys_table
from astra_serve.document import document_text, keys
from astra_serve.document.entry_text import TENANTS, with_entry
from astra_serve.document.keys import Key, Keys, Tenant, TenantLimits
from astra_serve.environment import KEYS
from astra_serve.errors import BadDocument, ServeError
from converter.errors import first_line, without_secrets

PREFIX = "astra-"  # scanners for secrets, and people, recognise a key by it
RANDOM_BYTES = 32
MODE = 0o600  # of a new document
MOST_DAYS = 36500
RIGHTS = ("base", "pinned_versions", "weight", "usage", "metrics")
LIMITS = tuple(TenantLimits.model_fields)

Edit = Callable[[Keys], tuple[Tenant | None, Tenant]]  # from the document to a tenant as it is, and as it will be


def main(argv: list[str]) -> int:
    """Run a command; return 0, 1 where the document cannot be read or written, 2 for bad input, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    if args.command == "schema":
        print(json.dumps(keys.json_schema(), indent=2))
        return 0
    where = args.keys or os.environ.get(KEYS, "")
    try:
        if not where:
            raise _Refused(f"which document? Give --keys FILE_OR_URL, or set {KEYS}")
        run: Callable[[str, argparse.Namespace], int] = {"new": _new, "list": _list, "revoke": _revoke}[args.command]
        return run(where, args)
    except _Refused as error:
        return _failed(error, 2)
    except ServeError as error:
        return _failed(error, 1)
    except (OSError, ValueError, ImportError) as error:  # of the file or the store, or a URL of no known store
        reason = getattr(error, "strerror", None) or first_line(error)
        return _failed(f"{without_secrets(where)} cannot be used: {reason}", 1)
    except KeyboardInterrupt:
        return _failed("interrupted: `astra-serve keys list` shows whether the document was changed", 130)


class _Refused(ServeError):
    """What the user asks for is not possible; nothing was changed."""


def _new(where: str, args: argparse.Namespace) -> int:
    """Add a key to a tenant, and print it when the document has its hash."""
    expires = _end(args.expires) if args.expires else None
    if len(args.label) > keys.MOST_LABEL:
        raise _Refused(f"--label has {len(args.label)} characters: give at most {keys.MOST_LABEL}")
    secret = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    try:
        key = keys.key({"hash": keys.hash_of(secret), "label": args.label, "expires": expires})
    except BadDocument as error:
        raise _Refused(str(error)) from error

    def edit(document: Keys) -> tuple[Tenant | None, Tenant]:
        old = document.get(args.tenant)
        if args.label and old and any(key.label == args.label for key in old.keys):
            raise _Refused(
                f"{args.tenant!r} has a key labelled {args.label!r}: choose another label, or revoke it first"
            )
        tenant = _with_settings(old, args)
        return old, tenant.model_copy(update={"keys": [*tenant.keys, key]})

    _change(where, edit)
    digits = keys_table.digits(key)
    try:
        print(secret, flush=True)
    except OSError as error:  # a pipe that is closed, a full disk
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (Python writes what is left at its end, and fails again)
        undo = f"astra-serve keys revoke {args.tenant} {digits}"
        raise ServeError(
            f"the key was stored, but cannot be printed ({error.strerror}): revoke it with {undo}"
        ) from error
    end = f" It expires at {expires.isoformat()}." if expires else ""
    shown = without_secrets(where)
    print(f"A key of {args.tenant}, shown once; {shown} has its hash, {digits}...{end}", file=sys.stderr)
    return 0


def _with_settings(old: Tenant | None, args: argparse.Namespace) -> Tenant:
    """Return the tenant that gets a key: the one of the document, or a new one. Raises _Refused."""
    given = {name: value for name in RIGHTS if (value := getattr(args, name)) is not None}
    limits = {name: value for name in LIMITS if (value := getattr(args, name)) is not None}
    if old:
        if args.adapter or given or limits:
            raise _Refused(f"the document has {old.name!r}: change its adapters, rights and limits there")
        return old
    if not args.adapter:
        raise _Refused(f"the document has no tenant {args.tenant!r}: give --adapter NAME_OR_GLOB to create it")
    content: dict[str, Any] = {"name": args.tenant, "adapters": args.adapter, **given}
    try:
        return keys.tenant(content | ({"limits": limits} if limits else {}))
    except BadDocument as error:
        raise _Refused(str(error)) from error


def _revoke(where: str, args: argparse.Namespace) -> int:
    """Remove one key of a tenant, or all of them."""
    if bool(args.key) == args.all:
        raise _Refused("which key? Give its label or the first digits of its hash, or --all")
    gone: list[Key] = []

    def edit(document: Keys) -> tuple[Tenant | None, Tenant]:
        old = _require(document, args.tenant)
        gone[:] = old.keys if args.all else [_found(old, args.key)]
        return old, old.model_copy(update={"keys": [key for key in old.keys if key not in gone]})

    _change(where, edit)
    for key in gone:
        print(f"revoked {keys_table.digits(key)} {key.label}".rstrip())
    if not gone:
        print(f"{args.tenant} has no keys", file=sys.stderr)
    return 0


def _found(tenant: Tenant, wanted: str) -> Key:
    """Return the key with a label, or with the first digits of a hash. Raises _Refused where it is not one key."""
    digits = wanted.removeprefix("sha256:").lower()
    found = [key for key in tenant.keys if key.label == wanted]
    if not found and re.fullmatch("[0-9a-f]{4,64}", digits):
        found = [key for key in tenant.keys if key.hash.removeprefix("sha256:").startswith(digits)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{keys_table.digits(key)} {key.label}".rstrip() for key in found or tenant.keys) or "none"
    if found:
        raise _Refused(f"{wanted!r} is more than one key of {tenant.name!r}; give digits of one: {there}")
    hint = "; a key itself is never an argument: give digits of its hash" if wanted.startswith(PREFIX) else ""
    shown = "this" if hint else repr(wanted)
    raise _Refused(f"{tenant.name!r} has no key {shown}{hint}; there are: {there}")


def _require(document: Keys, name: str) -> Tenant:
    if tenant := document.get(name):
        return tenant
    there = ", ".join(tenant.name for tenant in document.tenants[:20]) or "none"
    raise _Refused(f"the document has no tenant {name!r}; there are: {there}")


def _change(where: str, edit: Edit) -> None:
    """Replace one tenant by compare-and-swap. Raises ServeError and OSError; nothing is changed then."""

    def change(text: str) -> str:
        document = TENANTS.parse(text, without_secrets(where))
        old, new = edit(document)
        return with_entry(text, without_secrets(where), new.name, old, new, document, TENANTS)[1]

    document_text.check_writable(where)
    document_text.edit(where, change, MODE)


def _list(where: str, args: argparse.Namespace) -> int:
    document, now = keys.parse(document_text.read(where), without_secrets(where)), datetime.now(UTC)
    tenants = [_require(document, args.tenant)] if args.tenant else document.tenants
    if args.json:
        print(json.dumps([keys_table.described(tenant, now) for tenant in tenants], indent=2))
        return 0
    Console().print(keys_table.table(tenants, now))
    return 0


def _end(text: str, now: datetime | None = None) -> datetime:
    """Return the end of a key: after some days, or at a day or time, of UTC unless it says otherwise."""
    now = now or datetime.now(UTC).replace(microsecond=0)
    if days := re.fullmatch(r"(\d{1,5})d", text):
        if not 0 < int(days[1]) <= MOST_DAYS:
            raise _Refused(f"--expires {text}: give 1d to {MOST_DAYS}d")
        return now + timedelta(days=int(days[1]))
    try:
        end = datetime.fromisoformat(text)
    except ValueError as error:
        raise _Refused(f"--expires {text}: give days as 90d, or a date as 2027-01-01") from error
    end = end if end.tzinfo else end.replace(tzinfo=UTC)
    if end <= now:
        raise _Refused(f"--expires {text} is over: the key would open nothing")
    return end


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-serve keys",
        description="Make, list and revoke the keys of tenants in a keys document, which servers follow (--keys).",
        epilog="A key is added or revoked on every server within 5 s; nothing is restarted.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, tenant: bool | str = True) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if tenant:
            found.add_argument("tenant", metavar="TENANT", nargs="?" if tenant == "any" else None)
        found.add_argument("--keys", metavar="FILE_OR_URL", help=f"the keys document (default: {KEYS})")
        return found

    new = command("new", "make a key, print it once, and store its hash; creates the tenant if --adapter is given")
    new.add_argument("--label", default="", help="for people: who or what uses the key")
    new.add_argument("--expires", metavar="WHEN", help="after days, as 90d, or at a date, as 2027-01-01 (UTC)")
    _add_settings(new.add_argument_group("a new tenant", "Of a tenant that exists, change them in the document."))
    shown = command("list", "show tenants, and their keys by label and first digits of the hash", tenant="any")
    shown.add_argument("--json", action="store_true", help="print JSON")
    revoke = command("revoke", "remove a key: it opens nothing any more")
    revoke.add_argument("key", nargs="?", metavar="LABEL_OR_HASH", help="4 digits of the hash or more, or its label")
    revoke.add_argument("--all", action="store_true", help="all keys of the tenant")
    commands.add_parser("schema", help="print the JSON Schema of the document")
    return parser


def _add_settings(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    right: dict[str, Any] = {"action": "store_true", "default": None}
    add("--adapter", action="append", metavar="NAME_OR_GLOB", help="it may use these adapters; repeatable")
    add("--base", **right, help="it may use the base itself")
    add("--pinned-versions", **right, help="it may ask for NAME@DIGEST")
    add("--usage", **right, help="it may read its own usage")
    add("--metrics", **right, help="it may read the metrics, which name all tenants")
    add("--weight", type=float, metavar="W", help="its share of a full engine, relative to others (default: 1)")
    for name in LIMITS:
        text = "reserved for an answer without max_tokens" if name == "default_max_tokens" else "at most"
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def _failed(reason: object, status: int) -> int:
    print(f"astra-serve keys: {reason}", file=sys.stderr)
    return status
