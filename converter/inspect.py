"""`astra-convert inspect DIR`: what an adapter is, for people and as JSON."""

import re
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from converter import adapter_dir
from converter.adapter_dir import ASTRA_WEIGHTS, LORA_WEIGHTS, AstraAdapter, Json, LoraAdapter

# What a record must be to be shown; somebody else's may hold anything.
_KINDS: dict[str, type] = {"base": dict, "source": dict, "errors": dict, "verification": dict, "probe": dict}


def inspect(folder: Path) -> Json:
    """Return what the Astra adapter or LoRA in `folder` is. Raises AdapterError."""
    adapter: AstraAdapter | LoraAdapter
    if (folder / ASTRA_WEIGHTS).is_file():
        adapter, kind, weights = adapter_dir.load_astra(folder), "Astra adapter", ASTRA_WEIGHTS
        shapes, digest = adapter_dir.astra_shapes(folder), adapter_dir.astra_digest(folder)
    else:
        adapter, kind, weights = adapter_dir.load_lora(folder), "LoRA", LORA_WEIGHTS
        shapes, digest = adapter_dir.lora_shapes(folder), adapter_dir.lora_digest(folder)
    recorded = {key: value for key, value in adapter.provenance.items() if isinstance(value, _KINDS.get(key, object))}
    return {
        "kind": kind,
        "rank": max(shape.rank for shape in shapes.values()),
        "bytes": (folder / weights).stat().st_size,
        "base": recorded.get("base") or {"id": adapter.config.get("base_model_name_or_path")},
        "digest": digest,
        "digest_is_the_recorded_one": None if "digest" not in recorded else recorded["digest"] == digest,
        **{key: recorded.get(key) for key in ("method", "dtype", "tool", "source", "errors", "verification")},
        "unverified": recorded.get("unverified"),
        "probe": recorded.get("probe"),
        "layers": {module: shape._asdict() for module, shape in shapes.items()},
    }


def show(found: Json, console: Console) -> None:
    """Print what `inspect` found; layers that differ in their block alone share a line."""
    base, source, errors = found["base"], found["source"] or {}, found["errors"] or {}
    prompts = (found["probe"] or {}).get("prompts")
    facts = {
        "what": f"{found['kind']} of rank {found['rank']}, {len(found['layers'])} layers, {found['bytes']:,} bytes",
        "base": " ".join(str(base[key]) for key in ("id", "digest") if base.get(key)),
        "method": found["method"],
        "dtype": found["dtype"],
        "made by": found["tool"],
        "made from": " ".join(str(part) for part in (source.get("kind"), source.get("digest")) if part),
        "digest": found["digest"]
        + {None: "", True: ", as recorded", False: ", NOT the recorded one"}[found["digest_is_the_recorded_one"]],
        "error": f"{errors['relative']} of delta W" if "relative" in errors else None,
        "dropped": f"{errors['dropped_energy']} of the energy" if "dropped_energy" in errors else None,
        "verified": _verified(found),
        "probe": f"{len(prompts)} prompts" if isinstance(prompts, list) else None,
    }
    for key, value in facts.items():
        if value:
            shown = "".join(c if c.isprintable() else "?" for c in str(value))
            console.print(Text(f"{key:<10}{shown}"), soft_wrap=True)
    kinds = defaultdict(list)
    for module, layer in found["layers"].items():
        kinds[re.sub(r"(?<![^.])\d+(?![^.])", "*", module), layer["d_out"], layer["d_in"], layer["rank"]].append(module)
    table = Table("of them", "outputs", "inputs", "rank", "largest error", "layers")
    of_layers = errors.get("layers")
    of_layers = {k: v for k, v in of_layers.items() if isinstance(v, float)} if isinstance(of_layers, dict) else {}
    for (kind, *sizes), modules in kinds.items():
        worst = max((of_layers[module] for module in modules if module in of_layers), default=None)
        known = "" if worst is None else f"{worst:.2g}"
        table.add_row(str(len(modules)), *map(str, sizes), known, Text(kind, overflow="fold"))
    console.print(table)


def _verified(found: Json) -> str | None:
    if found["verification"] is None:
        return f"not in the model: {found['unverified']}" if found["unverified"] else None
    kl, effect = (found["verification"].get(key) for key in ("mean_kl", "effect"))
    return f"{kl} nats a token from the trained model, which is {effect} from its base"
