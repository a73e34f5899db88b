"""`astra-serve --base BASE --adapter name=DIR ...`: one engine, one base, every adapter by its name."""

import argparse
import sys
from importlib.metadata import version

from astra_serve.admission import admit, parse_adapter
from astra_serve.errors import ServeError
from converter.adapter_dir import AdapterError

MAX_SLOTS = 8


def main(argv: list[str] | None = None) -> int:
    """Run `astra-serve` and return its exit status: 0, or 2 with one line on stderr for bad input."""
    args, extra = _parser().parse_known_args(argv)
    try:
        if args.max_loras is not None and args.max_loras < 1:
            raise ServeError(f"--max-loras is {args.max_loras}: at least 1 adapter must fit into a batch")
        adapters = admit(args.base, [parse_adapter(text) for text in args.adapter])
        from astra_serve import engine  # after the checks: it takes seconds to import

        slots = args.max_loras or min(len(adapters), MAX_SLOTS)
        settings = engine.parse(args.base, adapters, slots, ["--host", args.host, "--port", str(args.port), *extra])
    except (ServeError, AdapterError) as error:
        print(f"astra-serve: {error}", file=sys.stderr)
        return 2
    engine.serve(settings)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-serve",
        description="Serve one base model and many LoRA adapters with vLLM, OpenAI-compatible.",
        epilog="Every other option goes to vLLM as it is: --max-model-len, --dtype, --api-key, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--base", required=True, help="a model folder, or a hub id such as Qwen/Qwen3-0.6B")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="serve the LoRA in DIR as NAME; repeatable"
    )
    parser.add_argument(
        "--max-loras",
        type=int,
        metavar="N",
        help=f"adapters in one batch; the engine swaps the others in (default: all, but at most {MAX_SLOTS})",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--version", action="version", version=version("astra-serve"))
    return parser
