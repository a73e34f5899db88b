"""Convert an adapter folder into a LoRA folder, or a merged model: read, choose the rank, write, read back, verify.

Nothing appears at the output path before every check has passed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import Progress

from converter import adapter_dir
from converter.adapter_dir import ENGINE_RANKS, AdapterError, BaseNotFound, Json
from converter.its_base import checked_identity, local_base
from converter.merge import merge, save_merged_provenance
from converter.source import Source
from converter.sources import open_source
from converter.stored import DTYPES, Auto, Rank, choose_rank, stored_lora
from converter.verify import compare, is_enough, verify

MAX_KL = 0.01  # nats per token, KL(trained || served)


@dataclass(frozen=True)
class Options:
    """The options of a conversion; `astra-convert --help` describes them."""

    base: str | None = None  # a folder or hub id; None: the base that the adapter names, if it is available locally
    dtype: str = "auto"
    rank: int | Auto | None = None
    energy: float | None = None
    fit_engine: bool = False
    initial: Path | None = None
    allow_pickle: bool = False
    verify: bool = True
    max_kl: float = MAX_KL
    prompts: Sequence[str] = ()
    merge: bool = False


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: the adapter that was read, the rank that was written, and the record of both."""

    source: Source
    rank: Rank | None  # None for a merged model
    provenance: Json


def convert(folder: Path, out: Path, options: Options, progress: Progress) -> Conversion:
    """Convert the adapter in `folder` and write it to the new folder `out`; after an error nothing is written.

    Raises AdapterError and OSError.
    """
    adapter_dir.refuse_existing(out)
    source, base = _open(folder, options)
    _check_rank(source, options)
    identity = source.base if base is None else checked_identity(folder, source, base, str(options.base))
    if options.merge:
        _check_merge(options)
        return write_merged(source, base, identity, out, progress)
    dtype = _dtype(source, identity, options.dtype)

    with progress, adapter_dir.new_folder(out) as new:
        comparison = compare(source, base, dtype, options.prompts, options.verify)
        tried: list[Json] = []
        rank = choose_rank(
            source,
            options.rank,
            options.energy,
            fit_engine=options.fit_engine,
            is_enough=partial(is_enough, source, dtype, comparison, options.max_kl, tried),
            on_layer=_new_bar(progress, "reading", len(source.factors)),
        )
        lora = stored_lora(source, rank, dtype)
        lora.config["base_model_name_or_path"] = identity.get("id")
        adapter_dir.save_lora(new, lora, on_layer=_new_bar(progress, "writing", len(source.factors)))
        checking = _new_bar(progress, "checking", len(source.factors))
        provenance = _provenance(source, identity, rank, dtype, adapter_dir.lora_digest(new), tried)
        provenance |= verify(new, source, rank, dtype, comparison, options.max_kl, checking)
        adapter_dir.save_lora_provenance(new, provenance)
        adapter_dir.copy_chat_files(folder, new)
        (new / "README.md").write_text(_card(provenance), encoding="utf-8")
    return Conversion(source, rank, provenance)


def write_merged(source: Source, base: Path | None, identity: Json, out: Path, progress: Progress) -> Conversion:
    """Write the base with the adapter added to its weights to the new folder `out`. Raises AdapterError."""
    if base is None:
        raise BaseNotFound("--merge writes the whole model: give --base, a model folder or a hub id")
    provenance = _origin(source, identity)
    with progress, adapter_dir.new_folder(out) as new:
        merge(source, base, new, _new_bar(progress, "merging", len(source.factors)))
        save_merged_provenance(new, provenance)
    return Conversion(source, None, provenance)


def _open(folder: Path, options: Options) -> tuple[Source, Path | None]:
    """Return the adapter in `folder`, read with the names of its base, and the base's folder, if it is available.

    Raises AdapterError.
    """
    opened = partial(open_source, folder, initial=options.initial, allow_pickle=options.allow_pickle)
    source = opened()
    base = local_base(source, options.base, needed=options.verify or bool(source.needs_base))
    if base is not None:
        source = opened(base=base)
    if source.needs_base:
        raise AdapterError(f"{folder}: {source.needs_base}: give it with --base, a model folder or a hub id")
    return source, base


def _check_rank(source: Source, options: Options) -> None:
    """Raise AdapterError where no engine can serve the exact LoRA of a DoRA, LoHa, LoKr or whole layer."""
    exact = max(shape.rank for shape in source.shapes.values())
    chosen = options.rank or options.energy or options.fit_engine or options.merge
    if not source.is_product and exact > ENGINE_RANKS[-1] and not chosen:
        raise AdapterError(
            f"the exact LoRA has rank {exact}, and engines serve at most {ENGINE_RANKS[-1]}: give --rank K, --rank "
            "auto or --energy E; the loss is measured and recorded"
        )


def _check_merge(options: Options) -> None:
    """Raise AdapterError where --merge was given with an option that only a LoRA has."""
    if options.rank or options.energy or options.fit_engine or options.dtype != "auto" or options.prompts:
        raise AdapterError(
            "--merge adds the whole change to the base, in its dtype: leave options for rank, dtype and prompts out"
        )


def _dtype(source: Source, identity: Json, option: str) -> torch.dtype:
    """Return the dtype of the factors; "auto" is the dtype of a plain LoRA, else the dtype of the base."""
    chosen = option
    if option == "auto" and source.plain_lora is not None:
        return next(iter(source.plain_lora.layers.values()))[0].dtype
    if option == "auto":
        chosen = identity.get("dtype", "float32")
    if chosen not in DTYPES:
        raise AdapterError(f"the base is stored in {chosen}: choose --dtype {', '.join(DTYPES)}")
    return DTYPES[chosen]


def _origin(source: Source, identity: Json) -> Json:
    """Return the fields of the provenance that a LoRA and a merged model share."""
    return {
        "tool": f"astra-convert {version('astra-serve')}",
        "base": identity,
        "method": source.origin["method"],
        "source": source.origin,
    }


def _provenance(
    source: Source, identity: Json, rank: Rank, dtype: torch.dtype, digest: str, tried: Sequence[Json]
) -> Json:
    """Return the provenance of a LoRA with that digest, without the fields that the checks measure."""
    provenance = {
        **_origin(source, identity),
        "dtype": str(dtype).removeprefix("torch."),
        "rank": rank.stored,
        "digest": digest,
    }
    if "id2label" in source.config:
        provenance["id2label"] = source.config["id2label"]
    if source.dropped:
        provenance["dropped"] = list(source.dropped)
    if tried:
        provenance["tried"] = sorted(tried, key=lambda row: row["rank"])
    return provenance


def _new_bar(progress: Progress, name: str, layers: int) -> Callable[[], None]:
    return partial(progress.advance, progress.add_task(name, total=layers))


_MODEL_CARD = """---
base_model: {base}
library_name: peft
tags: [lora, astra]
---
# LoRA of rank {rank}

Converted by `{tool}`. It is a standard LoRA against the original weights of `{base}` ({digest}): PEFT, vLLM and other
LoRA servers load it without changes. `astra.json` records the adapter that was converted, the measured errors, and a
probe: prompts with the expected next tokens.
"""


def _card(provenance: Json) -> str:
    base = provenance["base"]
    return _MODEL_CARD.format(**{**provenance, "base": base["id"], "digest": base.get("digest", "digest unknown")})
