"""The LoRA that is written: its rank, its dtype, and what both cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from converter.adapter_dir import ENGINE_RANKS, AdapterError, Json, Layers, LoraAdapter
from converter.compress import dropped_energy, singular_values, smallest_rank, total_dropped, truncated
from converter.sources import Factors, Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENERGY = 0.999  # what --fit-engine keeps


@dataclass(frozen=True)
class Rank:
    """The rank that an adapter is stored with, and the share of its energy that it drops."""

    stored: int
    exact: int  # without compression
    dropped: Mapping[str, float]  # by module; empty where nothing is
    total_dropped: float


def choose_rank(
    source: Source,
    rank: int | None = None,
    energy: float | None = None,
    *,
    fit_engine: bool = False,
    on_layer: Callable[[], None] = lambda: None,
) -> Rank:
    """Return the rank asked for: `rank`, or the smallest that keeps `energy` in every layer; what it is by default.

    With `fit_engine` it goes up to the next one that the engine has slots for: they cost the same.

    Engines read one rank per adapter: every layer gets it, also those that need less.
    """
    compresses = rank is not None or energy is not None or fit_engine
    exact, values = 1, {}
    for module, (lora_a, lora_b) in source.factors.items():
        exact = max(exact, len(lora_a))
        if compresses:
            if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
                raise AdapterError(f"{module} holds numbers that overflow float32")
            values[module] = singular_values(lora_a, lora_b)
        on_layer()
    if not compresses:
        return Rank(exact, exact, {}, 0.0)
    stored = rank or smallest_rank(values.values(), energy or ENERGY)
    if fit_engine:
        if stored > ENGINE_RANKS[-1]:
            raise AdapterError(f"rank {stored} is needed, and engines serve at most {ENGINE_RANKS[-1]}: give --rank")
        stored = next(k for k in ENGINE_RANKS if k >= stored)
    stored = min(stored, exact)
    if stored == exact:
        return Rank(exact, exact, {}, 0.0)
    dropped = {module: dropped_energy(found, stored) for module, found in values.items()}
    return Rank(stored, exact, dropped, total_dropped(values.values(), stored))


def stored_lora(source: Source, rank: Rank, dtype: torch.dtype) -> LoraAdapter:
    """Return `source` as the LoRA to be written, its layers made one by one.

    The scaling is in lora_B: engines read r and lora_alpha once per adapter, so lora_alpha = r, and layers of a smaller
    rank are padded with zeros. A LoRA that already is what it should be stays as it is. Reading a layer raises
    AdapterError where a factor overflows `dtype`.
    """
    plain = source.plain
    unchanged = plain is not None and rank.stored == rank.exact == plain.config["r"] and not _patterns(plain.config)

    def factors(module: str) -> Factors:
        found = plain.layers[module] if plain and unchanged else source.factors[module]
        if len(found[0]) > rank.stored:
            found = truncated(*found, rank.stored)
        missing = rank.stored - len(found[0])
        lora_a, lora_b = F.pad(found[0], (0, 0, 0, missing)).to(dtype), F.pad(found[1], (0, missing)).to(dtype)
        return fits(module, lora_a), fits(module, lora_b)

    def fits(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.isfinite().all():
            advice = "" if dtype is torch.float32 else ": convert with --dtype float32 or bfloat16"
            raise AdapterError(f"{name} overflows {dtype}{advice}")
        return tensor

    config: Json = dict(source.config)
    if not unchanged:
        config |= {"rank_pattern": {}, "alpha_pattern": {}, "r": rank.stored, "lora_alpha": rank.stored}
        config["use_rslora"] = False
    config["inference_mode"] = True
    head = Layers(list(source.head), lambda name: fits(name, source.head[name].to(dtype)))
    if head:
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in head})
    return LoraAdapter(Layers(list(source.factors), factors), config, {}, head)


def _patterns(config: Json) -> bool:
    return bool(config.get("rank_pattern") or config.get("alpha_pattern"))
