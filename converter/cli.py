"""The command line: `astra-convert ADAPTER_DIR OUT_DIR` and `astra-convert inspect DIR`."""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from converter.adapter_dir import AdapterError, Json
from converter.convert import MAX_KL, Conversion, Options, convert
from converter.inspect import inspect, show
from converter.stored import AUTO, DTYPES, ENERGY, Auto


def main(argv: list[str] | None = None) -> int:
    """Run `astra-convert` and return its exit status: 0, or 2 with one line on stderr for a fault of the input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _inspect(argv[1:]) if argv[:1] == ["inspect"] else _convert(argv)
    except (AdapterError, OSError, UnicodeError) as error:  # such as a full disk, or a name that no file can have
        print(f"astra-convert: {error}", file=sys.stderr)
        return 2


def _convert(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    options = Options(
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
    done = convert(args.adapter_dir, args.out_dir, options, progress)
    _report(args.out_dir, done, Console(), general_prompts=not options.prompts)
    return 0


def _inspect(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="astra-convert inspect", description="Show the properties and the record of an adapter."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="an Astra adapter or a LoRA")
    parser.add_argument("--json", action="store_true", help="print everything, with the errors of each layer, as JSON")
    args = parser.parse_args(argv)
    found = inspect(args.folder)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console())
    return 0


def _report(out: Path, done: Conversion, console: Console, *, general_prompts: bool) -> None:
    """Print the rank and the errors of the LoRA in `out`."""
    found, shapes, layers = done.provenance, done.source.shapes, len(done.source.factors)
    if done.rank is None:
        console.print(Text(f"{out}: the whole model, with {layers} layers changed"), soft_wrap=True)
        return
    stored, exact = done.rank.stored, done.rank.exact
    if "tried" in found:
        console.print(_tried(found["tried"]))
        if general_prompts:
            console.print(
                "Measured on general prompts. On its task an adapter changes more: give --prompts of the task."
            )
    elif done.rank.dropped:
        table = Table("layer", "rank before", "energy dropped", title=f"compressed to rank {stored}")
        for module, dropped in done.rank.dropped.items():
            before = len(done.source.factors[module][0]) if done.source.is_product else shapes[module].rank
            table.add_row(Text(module), str(before), f"{dropped:.3%}")
        table.add_row("all layers", str(exact), f"{done.rank.total_dropped:.3%}")
        console.print(table)
    trained = max(shape.rank for shape in shapes.values())
    how = {trained: "the trained rank", 2 * trained: f"twice the trained rank {trained}"}
    if not done.source.is_product:
        how = {exact: "the exact rank"}
    why = how.get(stored, f"trained with rank {trained}") if stored == exact else f"{exact} without compression"
    lines = [
        f"{out}: LoRA of rank {stored} ({why}), {layers} layers, {found['dtype']}",
        f"relative error of delta W: {found['errors']['relative']:.2g}",
    ]
    if copies := done.source.dropped:
        lines.append(f"left out, because they equal the base's tensors: {', '.join(copies)}")
    if "verification" in found:
        v = found["verification"]
        lines.append(
            f"served and trained model on {v['positions']} tokens: KL {v['mean_kl']:.2g} nats per token (effect of the "
            f"adapter: {v['effect']:.2g}), same greedy token at {v['greedy_agreement']:.1%}, logits differ by at most "
            f"{v['max_logit_difference']:.2g}"
        )
    else:
        lines.append(f"not compared in the model, and no probe: {found['unverified']}")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _tried(rows: list[Json]) -> Table:
    table = Table("rank", "energy dropped", "KL, nats per token", "same greedy token", title="ranks tried")
    for row in rows:
        table.add_row(
            str(row["rank"]), f"{row['dropped_energy']:.3%}", f"{row['mean_kl']:.2g}", f"{row['greedy_agreement']:.1%}"
        )
    return table


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"prompts {file} cannot be read: {error}") from error
    prompts = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not 0 < len(prompts) <= 64:
        raise AdapterError(f"prompts {file} has {len(prompts)} prompts: give 1 to 64")
    return prompts


def _energy(text: str) -> float:
    try:
        energy = float(text)
    except ValueError:
        energy = 0.0
    if not 0 < energy <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, for example {ENERGY}, not {text}")
    return energy


def _rank(text: str) -> int | Auto:
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer or {AUTO}, not {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-convert",
        description="Convert an adapter into a standard LoRA (PEFT's layout) against the original base weights, and "
        "verify that both are the same. To show an adapter: astra-convert inspect DIR [--json].",
    )
    add = parser.add_argument
    add("adapter_dir", type=Path, metavar="ADAPTER_DIR", help="folder that astra-train, PEFT or the paper's code wrote")
    add("out_dir", type=Path, metavar="OUT_DIR", help="a new folder")
    add("--base", help="original base: a model folder or a hub id (default: the recorded base, if it is local)")
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="dtype of the factors (default: auto, the dtype of the base, or of a plain LoRA)",
    )
    compression = parser.add_argument_group("compression")
    group = compression.add_mutually_exclusive_group()
    group.add_argument(
        "--rank",
        type=_rank,
        metavar="K",
        help="write the best approximation of rank K; auto: of the smallest rank with which the KL is at most --max-kl",
    )
    group.add_argument(
        "--energy", type=_energy, metavar="E", help="write the smallest rank with which every layer keeps this share"
    )
    compression.add_argument(
        "--fit-engine",
        action="store_true",
        help=f"raise that rank to the next one that vLLM has slots for (alone: --energy {ENERGY})",
    )
    others = parser.add_argument_group("adapters of other tools")
    others.add_argument(
        "--initial", type=Path, metavar="DIR", help="a PiSSA, OLoRA, CorDA ... adapter as it was saved before training"
    )
    others.add_argument("--allow-pickle", action="store_true", help="read adapter_model.bin: tensors only, never code")
    checks = parser.add_argument_group("verification")
    checks.add_argument(
        "--no-verify", action="store_true", help="compare no models, record no probe; factors are always checked"
    )
    checks.add_argument(
        "--max-kl",
        type=float,
        default=MAX_KL,
        metavar="NATS",
        help=f"fail if KL(trained || served) per token is larger (default: {MAX_KL})",
    )
    checks.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts to compare and record: one per line, \\n is a newline"
    )
    add("--merge", action="store_true", help="write the whole model with the adapter added to its weights instead")
    add("--version", action="version", version=version("astra-serve"))
    return parser
