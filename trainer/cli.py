"""The command line of the trainer.

astra-train --base BASE --data DATA --out DIR    train one adapter
astra-train analyze DIR                          write an HTML report about a finished run
"""

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

# Under accelerate launch only the first process prints.
_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
_MULTI_PROCESS = os.environ.get("WORLD_SIZE", "1") != "1"


def main(argv: list[str] | None = None) -> int:
    """Run `astra-train` and return its exit status; under accelerate launch, end the process with that status.

    0: success. 2: bad input, with one line on stderr. 130: interrupted.
    """
    status = _run(sys.argv[1:] if argv is None else argv)
    if _MULTI_PROCESS:
        _exit_without_finalising(status)
    return status


def _exit_without_finalising(status: int) -> NoReturn:
    """End the process after its threads and exit handlers, but without Python's finalisation.

    A gloo thread may still hold tensors of the last collective. If it frees them during finalisation, the process
    aborts. Destroying the process group waits for such threads only when nothing else refers to the group, and DTensor
    keeps a reference for a sharded base.
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
        print("astra-train: interrupted; no adapter was written", file=sys.stderr)
        return 130


def _train(argv: list[str]) -> int:
    parser = _train_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser._option_string_actions, n=1, cutoff=0)[0]
        raise ConfigError(f"unknown option {unknown[0]!r}: the nearest name is {near!r}")
    flags = [f"{key}={value}" for key in TrainConfig.model_fields if (value := getattr(args, key)) is not None]
    config = load_config(args.config, [*args.set, *flags])
    if args.dry_run:
        from trainer.plan import plan, show

        show(plan(args.base, args.data, config), config, Console())
        return 0
    from trainer.train import train  # imports transformers: only after the cheap checks

    run = train(args.base, args.data, args.out, config, _progress(), resume=args.resume)
    if _MAIN_PROCESS:
        for line in run.warnings():
            print(f"astra-train: {line}", file=sys.stderr)
        curve = run.result.curve
        method = "full fine-tuning" if config.method == "full" else f"{config.method} of rank {config.rank}"
        print(f"{args.out}: {method}, loss {curve[0].loss:.3f} -> {curve[-1].loss:.3f}")
        if run.forgetting:
            print(f"forgetting: {run.forgetting.change:+.3f} nats per token on text {run.forgetting.text}")
    return 0


def _analyze(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="astra-train analyze", description="Write a self-contained HTML report about a finished run."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder written by astra-train")
    parser.add_argument("--out", type=Path, help="file of the report (default: DIR/report.html)")
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
        epilog="With several processes: accelerate launch --multi_gpu --num_processes N -m trainer.cli ...",
    )
    parser.add_argument("--base", required=True, help="a model folder, or a hub id such as Qwen/Qwen3-0.6B")
    parser.add_argument(
        "--data",
        required=True,
        help='a json, jsonl, parquet, csv or tsv file, or a hub data set; a row is {"prompt","completion"}, '
        '{"messages"} or {"text"}; for task=dpo {"prompt","chosen","rejected"}; for task=classification '
        '{"text","label"}',
    )
    parser.add_argument("--out", required=True, type=Path, help="a new folder for the adapter")
    parser.add_argument("--resume", action="store_true", help="continue the unfinished run in OUT.unfinished")
    parser.add_argument("--dry-run", action="store_true", help="print the size of the run; load no weights")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable"
    )
    parser.add_argument("--version", action="version", version=version("astra-serve"))
    settings = parser.add_argument_group("settings", "each is a flag, a key of --config and a key of --set")
    for key, (text, choices) in describe().items():
        help_text = (f"{text}; one of {', '.join(choices)}" if choices else text).replace("%", "%%")
        settings.add_argument(f"--{key.replace('_', '-')}", dest=key, metavar="VALUE", help=help_text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
