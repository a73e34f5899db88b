"""`astra-convert ASTRA_DIR OUT_DIR`: an Astra adapter folder in, a standard LoRA folder out."""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from converter import adapter_dir
from converter.adapter_dir import AdapterError
from converter.delta import DTYPES, to_lora

CARD = """---
base_model: {base}
library_name: peft
tags: [lora, astra]
---
# LoRA of rank {rank}

Converted by `astra-convert` {version} from an Astra adapter. It is a standard LoRA against the original weights of
`{base}` ({digest}): PEFT, vLLM and every other LoRA server load it as it is.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `astra-convert` and return its exit status: 0, or 2 with one line on stderr for bad input."""
    args = _parser().parse_args(argv)
    try:
        convert(args.astra_dir, args.out_dir, base=args.base, dtype=args.dtype)
    except AdapterError as error:
        print(f"astra-convert: {error}", file=sys.stderr)
        return 2
    return 0


def convert(astra_dir: Path, out_dir: Path, *, base: str | None = None, dtype: str = "auto") -> None:
    """Convert the adapter in `astra_dir` and write it to `out_dir`. Raises AdapterError; then nothing is written."""
    adapter_dir.refuse_existing(out_dir)
    adapter = adapter_dir.load_astra(astra_dir)
    trained_on = adapter.provenance["base"]
    if base is not None:
        adapter_dir.check_base(astra_dir, trained_on["digest"], adapter_dir.base_digest(adapter_dir.find_base(base)))
    chosen = trained_on["dtype"] if dtype == "auto" else dtype
    if chosen not in DTYPES:
        raise AdapterError(f"the base is stored in {chosen}: choose --dtype {', '.join(DTYPES)}")
    lora = to_lora(adapter, DTYPES[chosen])
    rank = lora.config["r"]
    with adapter_dir.new_folder(out_dir) as folder:
        adapter_dir.save_lora(folder, lora)
        card = CARD.format(
            base=trained_on["id"], digest=trained_on["digest"], rank=rank, version=version("astra-serve")
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    trained = max(len(layer.a) for layer in adapter.layers.values())
    how = "the trained rank" if rank == trained else f"twice the trained rank {trained}"
    print(f"{out_dir}: LoRA of rank {rank} ({how}), {len(lora.layers)} layers, {lora.provenance['dtype']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="astra-convert",
        description="Convert an Astra adapter into a standard LoRA (PEFT layout) against the original base weights.",
    )
    parser.add_argument("astra_dir", type=Path, metavar="ASTRA_DIR", help="a folder written by astra-train")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a new folder for the LoRA")
    parser.add_argument("--base", help="check that the adapter was trained on this base: a model folder or a hub id")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="dtype of the factors (default: auto, the base's own)",
    )
    parser.add_argument("--version", action="version", version=version("astra-serve"))
    return parser
