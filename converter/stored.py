"""The LoRA to be written: choose its rank, and compute its layers in the chosen dtype."""

import bisect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch.nn import functional as F

from converter.adapter_dir import ENGINE_RANKS, AdapterError, Json, Layers, LoraAdapter
from converter.compress import dropped_energy, singular_values, smallest_rank, total_dropped, truncate
from converter.source import Factors, Source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Auto = Literal["auto"]
AUTO: Final = "auto"  # the smallest rank with which the served model agrees with the trained one
ENERGY = 0.999  # the share that --fit-engine keeps without --rank and --energy


@dataclass(frozen=True)
class Rank:
    """The rank with which an adapter is stored, and the share of its energy that this rank drops."""

    stored: int
    exact: int  # without compression
    dropped: Mapping[str, float]  # by module; empty without compression
    total_dropped: float


def choose_rank(
    source: Source,
    rank: int | Auto | None = None,
    energy: float | None = None,
    *,
    fit_engine: bool = False,
    is_enough: Callable[[Rank], bool] = lambda _: True,
    on_layer: Callable[[], None] = lambda: None,
) -> Rank:
    """Return the rank for `source`: `rank`, or the smallest with which every layer keeps `energy`, or the exact one.

    AUTO is the smallest rank that `is_enough`, found by bisection; the exact rank, which is not tried, is enough.
    `fit_engine` raises the rank to the next of ENGINE_RANKS, which costs the engine nothing. The result is never above
    the exact rank. Engines read one rank per adapter, so all layers get it. `on_layer` is called after each layer.
    Raises AdapterError.
    """
    compress = rank is not None or energy is not None or fit_engine
    exact, values = 1, {}
    for module, (lora_a, lora_b) in source.factors.items():
        exact = max(exact, len(lora_a))
        if compress:
            if not (lora_a.isfinite().all() and lora_b.isfinite().all()):
                raise AdapterError(f"{module!r} contains numbers that overflow float32")
            values[module] = singular_values(lora_a, lora_b)
        on_layer()

    def of_rank(stored: int) -> Rank:
        dropped = {module: dropped_energy(found, stored) for module, found in values.items()}
        return Rank(stored, exact, dropped, total_dropped(values.values(), stored))

    if not compress:
        return Rank(exact, exact, {}, 0.0)
    if rank == AUTO:
        stored = 1 + bisect.bisect_left(range(1, exact), True, key=lambda stored: is_enough(of_rank(stored)))
    else:
        stored = rank or smallest_rank(values.values(), energy or ENERGY)
    if fit_engine:
        if stored > ENGINE_RANKS[-1]:
            raise AdapterError(f"rank {stored} is needed, but engines serve at most {ENGINE_RANKS[-1]}: give --rank")
        stored = next(k for k in ENGINE_RANKS if k >= stored)
    return of_rank(stored) if stored < exact else Rank(exact, exact, {}, 0.0)


def stored_lora(source: Source, rank: Rank, dtype: torch.dtype) -> LoraAdapter:
    """Return `source` as the LoRA to be written; each layer is computed when it is accessed.

    Engines read r and lora_alpha once per adapter. Therefore lora_alpha = r, the scaling is multiplied into lora_B, and
    layers of a smaller rank are padded with zeros. A plain LoRA that needs none of this keeps its numbers. Accessing a
    layer raises AdapterError if a factor overflows `dtype`.
    """
    plain = source.plain_lora
    unchanged = plain is not None and rank.stored == rank.exact == plain.config["r"] and not _has_patterns(plain.config)

    def factors(module: str) -> Factors:
        found = plain.layers[module] if plain and unchanged else source.factors[module]
        if len(found[0]) > rank.stored:
            found = truncate(*found, rank.stored)
        missing = rank.stored - len(found[0])
        lora_a, lora_b = F.pad(found[0], (0, 0, 0, missing)).to(dtype), F.pad(found[1], (0, missing)).to(dtype)
        return finite(module, lora_a), finite(module, lora_b)

    def finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.isfinite().all():
            advice = "" if dtype is torch.float32 else ": convert with --dtype float32 or bfloat16"
            raise AdapterError(f"{name!r} overflows {dtype}{advice}")
        return tensor

    # PEFT warns about keys that it does not know; the record of the conversion has the names of the classes.
    config: Json = {key: value for key, value in source.config.items() if key != "id2label"}
    if not unchanged:
        config |= {"rank_pattern": {}, "alpha_pattern": {}, "r": rank.stored, "lora_alpha": rank.stored}
        config["use_rslora"] = False
    config["inference_mode"] = True
    head = Layers(list(source.head), lambda name: finite(name, source.head[name].to(dtype)))
    if head:
        config["modules_to_save"] = head_modules(head, source.config.get("modules_to_save") or ())
    return LoraAdapter(Layers(list(source.factors), factors), config, {}, head)


def head_modules(tensors: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Return the names of the modules of a classifier's head, which PEFT is to replace as a whole.

    `tensors` are the names of the head's tensors, `saved` the ends of names in the trained adapter's modules_to_save:
    RoBERTa's `classifier` contains `classifier.dense`, and PEFT does not load a module inside another one.
    """
    saved = list(saved)
    modules = set()
    for tensor in tensors:
        parts = tensor.split(".")[:-1]
        outer = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        modules.add(next((m for m in outer if any(m == s or m.endswith(f".{s}") for s in saved)), outer[-1]))
    return sorted(modules)


def _has_patterns(config: Json) -> bool:
    return bool(config.get("rank_pattern") or config.get("alpha_pattern"))
