"""`astra-serve --base BASE --adapter name=DIR ...`: one engine, one base, every adapter by its name."""

import argparse
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from astra_serve.adapters.admission import Base, engine_rank, open_base, parse_adapter
from astra_serve.document import desired
from astra_serve.document.desired import Adapter, Document
from astra_serve.environment import ADMIN_TOKEN, admin_token
from astra_serve.errors import EngineLost, ServeError
from astra_serve.observe.json_lines import JsonLines
from converter.errors import AstraError

MAX_SLOTS = 8
STORES = Path("~/.cache/astra/store").expanduser()
DOCUMENT_RANK = 64  # engine rank for adapters that are not known yet, unless --max-lora-rank says otherwise


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


def _serve(args: argparse.Namespace, extra: list[str], base: Base, document: Document | str, rank: int) -> None:
    """Import the engine, which takes seconds, and run the server. Raises ServeError."""
    from astra_serve import run
    from astra_serve.engine import options

    known = len(document.adapters) if isinstance(document, Document) else 2 * MAX_SLOTS
    slots = args.max_loras or min(known, MAX_SLOTS)
    resident = max(args.resident or known, slots)
    public = ["--host", args.host, "--port", str(args.port)]
    settings = options.parse(args.base, rank, slots, resident, [*public, *extra])
    if settings.headless:
        options.compute(settings)
        return
    run.serve(
        settings,
        replace(base, max_rank=settings.max_lora_rank) if rank else base,
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
        ),
    )


def _document(args: argparse.Namespace, base: Base, adapters: list[tuple[str, Path]]) -> tuple[Document | str, int]:
    """Return the desired state, or where it is, and the engine's maximum rank (0: no LoRA).

    Adapters that are known now are checked now, before the engine starts. Raises ServeError and AdapterError.
    """
    if args.adapters:
        if not args.adapters.startswith(("http://", "https://")) and Path(args.adapters).exists():
            desired.parse(Path(args.adapters).read_text(encoding="utf-8"), args.adapters)
        return args.adapters, DOCUMENT_RANK
    names = [name for name, _ in adapters]
    for name in names:
        if names.count(name) > 1:
            raise ServeError(f"two adapters are named {name!r}: names must differ")
        if name == base.name:
            raise ServeError(f"adapter {name!r} has the base's name: requests for the base would get the adapter")
    ranks = [base.check(folder).rank for _, folder in adapters]
    entries = [Adapter(name=name, source=str(folder.resolve()), required=True) for name, folder in adapters]
    return Document(adapters=entries), engine_rank(ranks) if ranks else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-serve",
        description="Serve one base model and many LoRA adapters with vLLM, OpenAI-compatible.",
        epilog="Every other option goes to vLLM as it is: --max-model-len, --dtype, --api-key, --max-lora-rank, ... "
        "Of a running server: astra-serve adapters --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--base", required=True, help="a model folder, or a hub id such as Qwen/Qwen3-0.6B")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="serve the LoRA in DIR as NAME; repeatable"
    )
    parser.add_argument(
        "--adapters", metavar="FILE_OR_URL", help="serve what this document says, and follow its changes"
    )
    parser.add_argument(
        "--max-loras",
        type=int,
        metavar="N",
        help=f"adapters in one batch; the engine swaps the others in (default: all, but at most {MAX_SLOTS})",
    )
    parser.add_argument(
        "--resident", type=int, metavar="N", help="adapters in the engine's memory; others are loaded when asked for"
    )
    store = parser.add_mutually_exclusive_group()
    store.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="where versions of adapters are kept, this server's own (default: ~/.cache/astra/store/PORT)",
    )
    store.add_argument(
        "--shared-store",
        type=Path,
        metavar="DIR",
        help="for several servers: each takes the first of DIR/0, DIR/1, ... that is free",
    )
    parser.add_argument(
        "--adapter-root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="adapters from local folders must lie in it; repeatable",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="what requests may take of a version that was replaced, and of all after SIGTERM (default: 600)",
    )
    parser.add_argument(
        "--engine-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="an engine that is silent for so long is lost, and the server ends with status 1 (default: 300)",
    )
    parser.add_argument(
        "--log-format", choices=["json", "text"], help="default: text on a terminal, JSON lines everywhere else"
    )
    parser.add_argument(
        "--admin-port", type=int, metavar="PORT", help=f"the admin API, with the token in {ADMIN_TOKEN}"
    )
    parser.add_argument("--admin-host", default="127.0.0.1", help="where it listens (default: 127.0.0.1)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--version", action="version", version=version("astra-serve"))
    return parser
