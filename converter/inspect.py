"""`astra-convert inspect DIR`: show the kind, base, rank, record and layers of an adapter, as text or JSON."""

import re
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from converter import adapter_dir
from converter.adapter_dir import ASTRA_WEIGHTS, AstraAdapter, Json, LoraAdapter

# Fields of a record that are shown only if they have this type: a record of another tool may have any.
_RECORD_TYPES: dict[str, type] = {"base": dict, "source": dict, "errors": dict, "verification": dict, "probe": dict}


def inspect(folder: Path) -> Json:
    """Return the properties and the record of the Astra adapter or LoRA in `folder`. Raises AdapterError."""
    adapter: AstraAdapter | LoraAdapter
    if (folder / ASTRA_WEIGHTS).is_file():
        adapter, kind, weights = adapter_dir.load_astra(folder), "Astra adapter", [folder / ASTRA_WEIGHTS]
        shapes, digest = adapter_dir.astra_shapes(folder), adapter_dir.astra_digest(folder)
    else:
        adapter, kind, weights = (
            adapter_dir.load_lora(folder),
            "LoRA",
            [folder / n for n in adapter_dir.weight_files(folder)],
        )
        shapes, digest = adapter_dir.lora_shapes(folder), adapter_dir.lora_digest(folder)
    recorded = {
        key: value for key, value in adapter.provenance.items() if isinstance(value, _RECORD_TYPES.get(key, object))
    }
    return {
        "kind": kind,
        "rank": max(shape.rank for shape in shapes.values()),
        "bytes": sum(file.stat().st_size for file in weights),
        "base": recorded.get("base") or {"id": adapter.config.get("base_model_name_or_path")},
        "digest": digest,
        "digest_is_the_recorded_one": None if "digest" not in recorded else recorded["digest"] == digest,
        **{key: recorded.get(key) for key in ("method", "dtype", "tool", "source", "errors", "verification")},
        "unverified": recorded.get("unverified"),
        "probe": recorded.get("probe"),
        "layers": {module: shape._asdict() for module, shape in shapes.items()},
    }


def show(found: Json, console: Console) -> None:
    """Print the result of `inspect`; layers that differ only in the number of their block share a line of the table."""
    base, source, errors = found["base"], found["source"] or {}, found["errors"] or {}
    prompts = (found["probe"] or {}).get("prompts")
    facts = {
        "adapter": f"{found['kind']} of rank {found['rank']}, {len(found['layers'])} layers, {found['bytes']:,} bytes",
        "base": " ".join(str(base[key]) for key in ("id", "digest") if base.get(key)),
        "method": found["method"],
        "dtype": found["dtype"],
        "tool": found["tool"],
        "source": " ".join(str(part) for part in (source.get("kind"), source.get("digest")) if part),
        "digest": found["digest"]
        + {None: "", True: ", as recorded", False: ", NOT as recorded"}[found["digest_is_the_recorded_one"]],
        "error": f"{errors['relative']} of delta W (relative)" if "relative" in errors else None,
        "dropped": f"{errors['dropped_energy']} of the energy" if "dropped_energy" in errors else None,
        "verified": _verified(found),
        "probe": f"{len(prompts)} prompts" if isinstance(prompts, list) else None,
    }
    for key, value in facts.items():
        if value:
            shown = "".join(c if c.isprintable() else "?" for c in str(value))
            console.print(Text(f"{key:<10}{shown}"), soft_wrap=True)
    groups = defaultdict(list)
    for module, layer in found["layers"].items():
        groups[re.sub(r"(?<![^.])\d+(?![^.])", "*", module), layer["d_out"], layer["d_in"], layer["rank"]].append(
            module
        )
    table = Table("layers", "d_out", "d_in", "rank", "largest error", "names")
    by_layer = errors.get("layers")
    by_layer = {k: v for k, v in by_layer.items() if isinstance(v, float)} if isinstance(by_layer, dict) else {}
    for (name, *sizes), modules in groups.items():
        largest = max((by_layer[module] for module in modules if module in by_layer), default=None)
        shown = "" if largest is None else f"{largest:.2g}"
        table.add_row(str(len(modules)), *map(str, sizes), shown, Text(name, overflow="fold"))
    console.print(table)


def _verified(found: Json) -> str | None:
    if found["verification"] is None:
        return f"not compared in the model: {found['unverified']}" if found["unverified"] else None
    kl, effect = (found["verification"].get(key) for key in ("mean_kl", "effect"))
    return f"KL {kl} nats per token from the trained model; effect of the adapter: {effect}"
