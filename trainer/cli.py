"""`astra-train --base BASE --data FILE.jsonl --out DIR`: train one adapter."""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from converter.adapter_dir import AdapterError
from trainer.config import describe, load_config
from trainer.errors import TrainerError


def main(argv: list[str] | None = None) -> int:
    """Run `astra-train` and return its exit status: 0, or 2 with one line on stderr for bad input."""
    args = _parser().parse_args(argv)
    try:
        config = load_config(args.config, args.set)
        from trainer.train import train  # after the cheap checks: it imports transformers

        curve = train(args.base, args.data, args.out, config, _progress())
    except (TrainerError, AdapterError) as error:
        print(f"astra-train: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: Astra adapter of rank {config.rank}, loss {curve[0].loss:.3f} -> {curve[-1].loss:.3f}")
    return 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-train",
        description="Train an Astra adapter for one task on a frozen base model.",
        epilog=f"settings (--config file keys and --set):\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", required=True, help="a model folder, or a hub id such as Qwen/Qwen3-0.6B")
    parser.add_argument(
        "--data", required=True, type=Path, help='JSONL; rows of {"prompt","completion"}, {"messages"} or {"text"}'
    )
    parser.add_argument("--out", required=True, type=Path, help="a new folder for the adapter")
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable"
    )
    parser.add_argument("--version", action="version", version=version("astra-serve"))
    return parser
