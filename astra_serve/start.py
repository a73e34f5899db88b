"""`astra-serve --base BASE --adapter name=DIR ...`: one engine, one base, every adapter by its name."""

import argparse
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from astra_serve.adapters.admission import Base, engine_rank, open_base, parse_adapter
from astra_serve.adapters.defaults import BaseTokenizer
from astra_serve.adapters.upload_target import UploadTarget
from astra_serve.document import desired, document_text
from astra_serve.document.desired import Adapter, Document
from astra_serve.environment import (
    ADMIN_TOKEN,
    LIMITS_STORE,
    POLICY_TOKEN,
    admin_token,
    limits_store,
    policy_token,
)
from astra_serve.errors import EngineLost, ServeError
from astra_serve.gateway.tenancy.quota.redis_store import RedisStore
from astra_serve.observe.json_lines import JsonLines
from converter.errors import AstraError

MAX_SLOTS = 8
STORES = Path("~/.cache/astra/store").expanduser()
DOCUMENT_RANK = 64  # engine rank for adapters that are not known yet, unless --max-lora-rank says otherwise
MEMORY = "memory"
UNITS = {None: 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(argv: list[str], lines: JsonLines) -> int:
    """Start a server as `argv` says, run it until it ends, and return the exit status; `lines` are its output as JSON.

    0 after SIGTERM (143, or 130 for SIGINT, while the server starts); with one line on stderr 2 for bad input, and 1
    when the engine has died.
    """
    args, extra = _parser().parse_known_args(argv)
    try:
        _check(args)
        base = open_base(args.base)
        document, rank = _document(args, base, [parse_adapter(text) for text in args.adapter])
        if args.log_format == "json" or (args.log_format is None and not sys.stderr.isatty()):
            lines.start()
            extra = ["--logging-config.formatter", "json", *extra]
        _serve(args, extra, base, document, rank)
    except AstraError as error:
        print(f"astra-serve: {error}", file=sys.stderr)
        return 1 if isinstance(error, EngineLost) else 2
    finally:
        lines.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ServeError where options exclude each other or have impossible values."""
    if args.max_loras is not None and args.max_loras < 1:
        raise ServeError(f"--max-loras is {args.max_loras}: at least 1 adapter must fit into a batch")
    if args.engine_timeout <= 0:
        raise ServeError(f"--engine-timeout is {args.engine_timeout}: give the seconds that an engine may be silent")
    if args.adapters and args.adapter:
        raise ServeError("--adapter names a fixed set of adapters, --adapters a document that may change: give one")
    if args.admin_port is not None and not (admin_token() and args.adapters):
        raise ServeError(
            f"--admin-port needs a token in {ADMIN_TOKEN}, and --adapters FILE, the document that it edits"
        )
    if args.policy_port is not None and not (policy_token() and args.adapter_root):
        raise ServeError(
            f"--policy-port needs a token in {POLICY_TOKEN} or {ADMIN_TOKEN}, and --adapter-root DIR, the folder that "
            "the trainer writes its policies in"
        )
    _upload_target(args)
    _limits_store(args, "")


def _serve(args: argparse.Namespace, extra: list[str], base: Base, document: Document | str, rank: int) -> None:
    """Import the engine, which takes seconds, and run the server. Raises ServeError."""
    from astra_serve import run
    from astra_serve.engine import options

    known = len(document.adapters) if isinstance(document, Document) else 2 * MAX_SLOTS
    if args.policy_port is not None:
        known, rank = max(known, 2 * MAX_SLOTS), max(rank, DOCUMENT_RANK)
    slots = args.max_loras or min(known, MAX_SLOTS)
    resident = max(args.resident or known, slots)
    words = ["--host", args.host, "--port", str(args.port), *extra]
    settings = options.parse(args.base, rank, slots, resident, words)
    if settings.headless:
        options.compute(settings)
        return
    run.serve(
        settings,
        base_as_served(base, settings, rank),
        run.Settings(
            document=document,
            store=args.shared_store or args.store or STORES / str(args.port),
            store_shared=args.shared_store is not None,
            resident=resident,
            drain_s=args.drain_seconds,
            engine_timeout_s=args.engine_timeout,
            roots=tuple(args.adapter_root),
            admin=(args.admin_host, args.admin_port) if args.admin_port is not None else None,
            admin_token=admin_token(),
            policies=(args.policy_host, args.policy_port) if args.policy_port is not None else None,
            policy_token=policy_token(),
            upload_to=_upload_target(args),
            keys=args.keys,
            max_body=args.max_body,
            limits_store=_limits_store(args, base.name),
        ),
    )


def _upload_target(args: argparse.Namespace) -> UploadTarget | None:
    """Return where published bytes are copied to. Raises ServeError where no server could fetch them from there."""
    if args.upload_to is None:
        return None
    if args.admin_port is None:
        raise ServeError("--upload-to is for adapters that the admin API receives: give --admin-port")
    if "://" in args.adapters:
        raise ServeError(f"--upload-to needs a document that this server may change, and {args.adapters} is only read")
    target = UploadTarget(args.upload_to)
    roots = [root.resolve() for root in args.adapter_root]
    if target.folder and roots and not any(target.folder.resolve().is_relative_to(root) for root in roots):
        raise ServeError(f"--upload-to {args.upload_to} is outside of --adapter-root: adapters there are refused")
    return target


def _limits_store(args: argparse.Namespace, base: str) -> RedisStore | None:
    """Return the store of limits, None for this server's memory. Raises ServeError where its address is none."""
    url = args.limits_store or limits_store() or MEMORY
    return None if url == MEMORY else RedisStore(url, base)


def base_as_served(base: Base, settings: argparse.Namespace, rank: int) -> Base:
    """Return the base with what vLLM's settings say of it: the largest rank, and the chat template."""
    if settings.chat_template or settings.tokenizer not in (None, settings.model):
        base = replace(base, tokenizer=BaseTokenizer(base.folder, as_served=False))
    return replace(base, max_rank=settings.max_lora_rank) if rank else base


def _document(args: argparse.Namespace, base: Base, adapters: list[tuple[str, Path]]) -> tuple[Document | str, int]:
    """Return the desired state, or where it is, and the engine's maximum rank (0: no LoRA).

    Adapters that are known now are checked now, before the engine starts. Raises ServeError and AdapterError.
    """
    if args.adapters:
        if "://" not in args.adapters:
            desired.parse(_read(args.adapters), args.adapters)
        return args.adapters, DOCUMENT_RANK
    if any(name == base.name for name, _ in adapters):
        raise ServeError(f"adapter {base.name!r} has the base's name: requests for the base would get the adapter")
    ranks = [base.check(folder).rank for _, folder in adapters]
    entries = [Adapter(name=name, source=str(folder.resolve()), required=True) for name, folder in adapters]
    try:
        return Document(adapters=entries), engine_rank(ranks) if ranks else 0
    except ValidationError as error:
        raise ServeError(f"{error.errors()[0]['ctx']['error']}: names must differ") from error


def _read(document: str) -> str:
    try:
        return document_text.read(document)
    except OSError as error:
        raise ServeError(f"{document} cannot be read: {error.strerror}") from error


def _size(text: str) -> int:
    """Return a number of bytes, given as such or in KiB, MiB or GiB."""
    found = re.fullmatch(r"([1-9]\d*)(KiB|MiB|GiB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give bytes, or a size such as 8MiB")
    return int(found[1]) * UNITS[found[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-serve",
        description="Serve one base model and many LoRA adapters with vLLM, OpenAI-compatible.",
        epilog="Every other option goes to vLLM as it is: --max-model-len, --dtype, --api-key, --max-lora-rank, ... "
        "Of a running server: astra-serve adapters --help, astra-serve usage --help. Of keys: astra-serve keys --help.",
        allow_abbrev=False,
    )
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    seconds: dict[str, Any] = {"type": float, "metavar": "S"}
    add = parser.add_argument
    add("--base", required=True, help="a model folder, or a hub id such as Qwen/Qwen3-0.6B")
    add("--adapter", action="append", default=[], metavar="NAME=DIR", help="serve the LoRA in DIR as NAME; repeatable")
    add("--adapters", metavar="FILE_OR_URL", help="serve the adapters of this document, and follow its changes")
    add("--keys", metavar="FILE_OR_URL", help="let the tenants of this document in, and follow its changes")
    add("--max-loras", type=int, metavar="N", help=f"adapters in one batch (default: all, at most {MAX_SLOTS})")
    resident = "adapters in the engine's memory, at least --max-loras; others are loaded when a request needs them "
    resident += "(default: all with --adapter, 16 with --adapters or --policy-port)"
    add("--resident", type=int, metavar="N", help=resident)
    store = parser.add_mutually_exclusive_group()
    default = "~/.cache/astra/store/PORT"
    store.add_argument("--store", **folder, help=f"where this server alone keeps its adapters (default: {default})")
    shared = "for several servers: each uses the first of DIR/0, DIR/1, ... that is free"
    store.add_argument("--shared-store", **folder, help=shared)
    add("--adapter-root", action="append", default=[], **folder, help="local adapters must be in it; repeatable")
    drain = "the time that requests have when their version is replaced, and all of them after SIGTERM (default: 600)"
    add("--drain-seconds", default=600.0, **seconds, help=drain)
    silent = "an engine that is silent for so long is lost, and the server ends with status 1 (default: 300)"
    add("--engine-timeout", default=300.0, **seconds, help=silent)
    body = "the largest body of a request, in bytes or as 8MiB (default: 8MiB, and 64MiB where the base reads pictures)"
    add("--max-body", type=_size, metavar="SIZE", help=body)
    limits = (
        f"where the use of limits is counted: {MEMORY}, of each server alone (default), or redis://HOST:PORT/DB for "
    )
    limits += f"all replicas; an address with a password is better given in {LIMITS_STORE}"
    add("--limits-store", metavar="memory|URL", help=limits)
    add("--log-format", choices=["json", "text"], help="default: text on a terminal, JSON lines everywhere else")
    add("--admin-port", type=int, metavar="PORT", help=f"the port of the admin API, with the token in {ADMIN_TOKEN}")
    add("--admin-host", default="127.0.0.1", help="its address (default: 127.0.0.1)")
    policies = f"the port of trainers, which load a policy at each step from --adapter-root; token in {POLICY_TOKEN}"
    add("--policy-port", type=int, metavar="PORT", help=f"{policies}, otherwise in {ADMIN_TOKEN}")
    add("--policy-host", default="127.0.0.1", help="its address (default: 127.0.0.1)")
    upload = (
        "take adapters as bytes, and copy them there: a folder that every replica sees, or a URL as s3://bucket/key"
    )
    add("--upload-to", metavar="DIR_OR_URL", help=upload)
    add("--host", default="127.0.0.1", help="the address of the public port (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="the public port (default: 8000)")
    add("--version", action="version", version=version("astra-serve"))
    return parser
