"""`astra-train --base BASE --data DATA --out DIR`: train one adapter. `astra-train analyze DIR`: look at it."""

import argparse
import atexit
import difflib
import os
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from converter.adapter_dir import AdapterError
from trainer.config import TrainConfig, describe, load_config
from trainer.errors import ConfigError, Interrupted, TrainerError

# accelerate launch starts several processes, and one of them speaks
_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
_SEVERAL = os.environ.get("WORLD_SIZE", "1") != "1"


def main(argv: list[str] | None = None) -> int:
    """Run `astra-train` and return its exit status; of several processes each ends with it.

    0; 2 with one line on stderr for bad input; 130 when it was interrupted.
    """
    status = _run(sys.argv[1:] if argv is None else argv)
    if _SEVERAL:
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    """End the process with what others want done at its end, but without taking Python apart.

    A thread of gloo may hold the tensors of the last collective still; when it lets go of them in a Python that is
    being taken apart, the process aborts. Ending the process group waits for those threads only where nothing else
    refers to it, and what DTensor remembers of a sharded base does.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(argv: list[str]) -> int:
    try:
        return _analyze(argv[1:]) if argv[:1] == ["analyze"] else _train(argv)
    except (TrainerError, AdapterError) as error:
        if _MAIN_PROCESS:
            print(f"astra-train: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 2
    except KeyboardInterrupt:
        print("astra-train: interrupted before the first checkpoint; nothing was written", file=sys.stderr)
        return 130


def _train(argv: list[str]) -> int:
    parser = _train_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1, cutoff=0)[0]
        raise ConfigError(f"unknown option {unknown[0]!r}: the nearest one is {near!r}")
    flags = [f"{key}={value}" for key in TrainConfig.model_fields if (value := getattr(args, key)) is not None]
    config = load_config(args.config, [*args.set, *flags])
    if args.dry_run:
        from trainer.plan import plan, show

        show(plan(args.base, args.data, config), config, Console())
        return 0
    from trainer.train import train  # after the cheap checks: it imports transformers

    run = train(args.base, args.data, args.out, config, _progress(), resume=args.resume)
    if _MAIN_PROCESS:
        for line in run.warnings():
            print(f"astra-train: {line}", file=sys.stderr)
        curve = run.result.curve
        what = "full fine-tuning" if config.method == "full" else f"{config.method} of rank {config.rank}"
        print(f"{args.out}: {what}, loss {curve[0].loss:.3f} -> {curve[-1].loss:.3f}")
        if run.forgetting:
            print(f"forgetting: {run.forgetting.change:+.3f} nats per token on text {run.forgetting.text}")
    return 0


def _analyze(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="astra-train analyze", description="Write one self-contained HTML report about a trained adapter."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder written by astra-train")
    parser.add_argument("--out", type=Path, help="the report's file (default: DIR/report.html)")
    args = parser.parse_args(argv)
    from trainer.analysis.page import analyze

    print(analyze(args.folder, args.out or args.folder / "report.html"))
    return 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not _MAIN_PROCESS,
    )


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-train",
        allow_abbrev=False,
        usage="astra-train --base BASE --data DATA --out DIR [--KEY VALUE ...]\n       astra-train analyze DIR",
        description="Train an adapter for one task on a frozen base model.",
        epilog="On several processes: accelerate launch --multi_gpu --num_processes N -m trainer.cli ...",
    )
    parser.add_argument("--base", required=True, help="a model folder, or a hub id such as Qwen/Qwen3-0.6B")
    parser.add_argument(
        "--data",
        required=True,
        help='a json, jsonl, parquet or csv file, or a hub data set; rows of {"prompt","completion"}, {"messages"}, '
        '{"text"}, or {"text","label"} for task=classification',
    )
    parser.add_argument("--out", required=True, type=Path, help="a new folder for the adapter")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run beside --out")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would need; load no weights")
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable"
    )
    parser.add_argument("--version", action="version", version=version("astra-serve"))
    settings = parser.add_argument_group("settings", "keys of --config and --set, and flags")
    for key, (text, choices) in describe().items():
        meaning = f"{text}; one of {', '.join(choices)}" if choices else text
        settings.add_argument(f"--{key.replace('_', '-')}", dest=key, metavar="VALUE", help=meaning.replace("%", "%%"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
