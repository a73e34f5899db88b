"""`astra-convert ADAPTER_DIR OUT_DIR`: any adapter folder in, a standard LoRA folder out. And `inspect`."""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from converter.adapter_dir import AdapterError
from converter.convert import MOST_KL, Done, Wanted, convert
from converter.inspect import inspect, show
from converter.stored import DTYPES, ENERGY


def main(argv: list[str] | None = None) -> int:
    """Run `astra-convert` and return its exit status: 0, or 2 with one line on stderr for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _inspect(argv[1:]) if argv[:1] == ["inspect"] else _convert(argv)
    except (AdapterError, OSError, UnicodeError) as error:  # the latter: a full disk, a name that no file can have
        print(f"astra-convert: {error}", file=sys.stderr)
        return 2


def _convert(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    wanted = Wanted(
        base=args.base,
        dtype=args.dtype,
        rank=args.rank,
        energy=args.energy,
        fit_engine=args.fit_engine,
        initial=args.initial,
        allow_pickle=args.allow_pickle,
        verify=not args.no_verify,
        max_kl=args.max_kl,
        prompts=_prompts(args.prompts),
        merge=args.merge,
    )
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    _report(args.out_dir, convert(args.adapter_dir, args.out_dir, wanted, progress), Console())
    return 0


def _inspect(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="astra-convert inspect", description="Say what an adapter is.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="an Astra adapter or a LoRA")
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    args = parser.parse_args(argv)
    found = inspect(args.folder)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console())
    return 0


def _report(out: Path, done: Done, console: Console) -> None:
    """Print what was written and what is known of it."""
    found, layers = done.provenance, len(done.source.factors)
    if done.rank is None:
        console.print(Text(f"{out}: the whole model, with {layers} layers changed"), soft_wrap=True)
        return
    stored, exact = done.rank.stored, done.rank.exact
    if done.rank.dropped:
        table = Table("layer", "rank before", "energy dropped", title=f"compressed to rank {stored}")
        for module, dropped in done.rank.dropped.items():
            table.add_row(Text(module), str(len(done.source.factors[module][0])), f"{dropped:.3%}")
        table.add_row("all layers", str(exact), f"{done.rank.total_dropped:.3%}")
        console.print(table)
    trained = max(shape.rank for shape in done.source.shapes.values())
    how = {trained: "the trained rank", 2 * trained: f"twice the trained rank {trained}"}
    why = how.get(stored, f"trained with {trained}") if stored == exact else f"{exact} without compression"
    lines = [
        f"{out}: LoRA of rank {stored} ({why}), {layers} layers, {found['dtype']}",
        f"error of delta W: {found['errors']['relative']:.2g}",
    ]
    if "verification" in found:
        v = found["verification"]
        lines.append(
            f"served against trained model, {v['positions']} tokens: {v['mean_kl']:.2g} nats a token (the adapter's "
            f"own effect: {v['effect']:.2g}), greedy tokens {v['greedy_agreement']:.1%} the same, logits within "
            f"{v['max_logit_difference']:.2g}"
        )
    else:
        lines.append(f"not verified in the model, and no probe: {found['unverified']}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"prompts {file} cannot be read: {error}") from error
    prompts = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not 0 < len(prompts) <= 64:
        raise AdapterError(f"prompts {file} has {len(prompts)} lines: give 1 to 64")
    return prompts


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0 and up to 1, as {ENERGY}, not {text}")
    return share


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-convert",
        description="Convert an adapter into a standard LoRA (PEFT layout) against the original base weights, and "
        "prove that it is the adapter. Also: astra-convert inspect DIR [--json].",
    )
    add = parser.add_argument
    add("adapter_dir", type=Path, metavar="ADAPTER_DIR", help="written by astra-train, PEFT or the paper's code")
    add("out_dir", type=Path, metavar="OUT_DIR", help="a new folder")
    add("--base", help="the original base, a model folder or a hub id (default: the one recorded, where it is at hand)")
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the factors (default: auto, the base's own; a plain LoRA's stay)",
    )
    smaller = parser.add_argument_group("a smaller rank")
    group = smaller.add_mutually_exclusive_group()
    group.add_argument("--rank", type=_rank, metavar="K", help="the best adapter of this rank")
    group.add_argument("--energy", type=_share, metavar="E", help="the smallest rank at which every layer keeps E")
    smaller.add_argument(
        "--fit-engine",
        action="store_true",
        help=f"then up to a rank that vLLM has slots for (without --energy: {ENERGY})",
    )
    others = parser.add_argument_group("other people's adapters")
    others.add_argument("--initial", type=Path, metavar="DIR", help="the start of a PiSSA, OLoRA, CorDA ... adapter")
    others.add_argument("--allow-pickle", action="store_true", help="read adapter_model.bin (weights only)")
    checks = parser.add_argument_group("the proof")
    checks.add_argument("--no-verify", action="store_true", help="do not compare in the model; the factors are always")
    checks.add_argument(
        "--max-kl",
        type=float,
        default=MOST_KL,
        metavar="NATS",
        help=f"write nothing if the served model is farther from the trained one (default {MOST_KL})",
    )
    checks.add_argument("--prompts", type=Path, metavar="FILE", help="what the probe asks: a prompt a line")
    add("--merge", action="store_true", help="write the whole model with the adapter in its weights instead")
    add("--version", action="version", version=version("astra-serve"))
    return parser
