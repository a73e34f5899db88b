"""The way through: an adapter folder of any origin in, a LoRA folder (or a merged model) that was checked out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import Progress

from converter import adapter_dir
from converter.adapter_dir import AdapterError, BaseNotFound, Json, WrongBase
from converter.check_factors import check_factors
from converter.merge import merge, record
from converter.sources import Source, open_source
from converter.stored import DTYPES, Rank, choose_rank, stored_lora

_SAME = 0.05  # of a weight's norm: residual models are stored in 16 bits
MOST_KL = 0.01  # nats a token, between the trained and the served model


@dataclass(frozen=True)
class Wanted:
    """What the user asked for beyond the two folders."""

    base: str | None = None  # a folder or hub id; None: the one that the adapter names, where it is at hand
    dtype: str = "auto"
    rank: int | None = None
    energy: float | None = None
    fit_engine: bool = False
    initial: Path | None = None
    allow_pickle: bool = False
    verify: bool = True
    max_kl: float = MOST_KL
    prompts: Sequence[str] = ()
    merge: bool = False


@dataclass(frozen=True)
class Done:
    """What was written, and what is known of it."""

    source: Source
    rank: Rank | None  # None of a merged model
    provenance: Json


def convert(folder: Path, out: Path, wanted: Wanted, progress: Progress) -> Done:
    """Convert the adapter in `folder` and write it to `out`. Raises AdapterError; then nothing is written."""
    adapter_dir.refuse_existing(out)
    source = open_source(folder, initial=wanted.initial, allow_pickle=wanted.allow_pickle)
    base = base_at_hand(source, wanted)
    identity = source.base
    if base is not None:
        digest = adapter_dir.base_digest(base)
        check_base(folder, source, base, digest)
        identity = {"id": wanted.base, "digest": digest, "dtype": adapter_dir.base_dtype(base)} | source.base
    if wanted.merge:
        if wanted.rank or wanted.energy or wanted.fit_engine or wanted.dtype != "auto" or wanted.prompts:
            raise AdapterError(
                "--merge adds the whole change to the base in its own dtype: leave rank, dtype, prompts out"
            )
        return merged(source, base, identity, out, progress)
    dtype = _dtype(source, identity, wanted.dtype)

    with progress, adapter_dir.new_folder(out) as new:
        advance = _bar(progress, "reading", len(source.factors))
        rank = choose_rank(source, wanted.rank, wanted.energy, fit_engine=wanted.fit_engine, on_layer=advance)
        lora = stored_lora(source, rank, dtype)
        lora.config["base_model_name_or_path"] = identity.get("id")
        advance = _bar(progress, "writing", len(source.factors))
        adapter_dir.save_lora(new, lora, on_layer=advance)
        provenance = {
            "tool": f"astra-convert {version('astra-serve')}",
            "base": identity,
            "method": source.origin["method"],
            "source": source.origin,
            "dtype": str(dtype).removeprefix("torch."),
            "rank": rank.stored,
            "digest": adapter_dir.lora_digest(new),
        }
        provenance |= checked(new, source, rank, dtype, base, wanted, _bar(progress, "checking", len(source.factors)))
        adapter_dir.save_lora_provenance(new, provenance)
        (new / "README.md").write_text(_card(provenance), encoding="utf-8")
    return Done(source, rank, provenance)


def checked(
    new: Path,
    source: Source,
    rank: Rank,
    dtype: torch.dtype,
    base: Path | None,
    wanted: Wanted,
    on_layer: Callable[[], None],
) -> Json:
    """Read back what was written and return the errors found, how the model agrees, and its probe."""
    stored = adapter_dir.load_lora(new)
    errors = check_factors(source, stored, rank, dtype, on_layer)
    found: Json = {"errors": {"relative": _short(errors.total), "layers": _all_short(errors.layers)}}
    if rank.dropped:
        dropped = {"dropped_energy": _short(rank.total_dropped), "dropped_energy_by_layer": _all_short(rank.dropped)}
        found["errors"] |= dropped
    if not wanted.verify:
        return {**found, "unverified": "--no-verify was given"}
    from converter import check_model  # imports transformers, which takes seconds

    why_not = check_model.why_not(source, base)
    if base is None or why_not:
        return {**found, "unverified": why_not}
    prompts = wanted.prompts or check_model.PROMPTS
    served = DTYPES.get(adapter_dir.base_dtype(base), dtype)
    agreement, probe = check_model.check_model(source, stored, base, served, prompts, wanted.max_kl)
    return {**found, "verification": _all_short(asdict(agreement)), "probe": probe}


def merged(source: Source, base: Path | None, identity: Json, out: Path, progress: Progress) -> Done:
    """Write the base with the adapter in its weights to `out`. Raises AdapterError."""
    if base is None:
        raise BaseNotFound("--merge writes the whole model: give --base, a model folder or a hub id")
    provenance = {
        "tool": f"astra-convert {version('astra-serve')}",
        "base": identity,
        "method": source.origin["method"],
        "source": source.origin,
    }
    with progress, adapter_dir.new_folder(out) as new:
        merge(source, base, new, _bar(progress, "merging", len(source.factors)))
        record(new, provenance)
    return Done(source, None, provenance)


def base_at_hand(source: Source, wanted: Wanted) -> Path | None:
    """Return the folder of the base that was given or, to verify with, of the one that the adapter names.

    The latter is not downloaded. Raises BaseNotFound.
    """
    if wanted.base is not None:
        return adapter_dir.find_base(wanted.base)
    named = source.base.get("id")
    if named is None:
        raise BaseNotFound(
            "the adapter does not name its base, or names a model from which its start was taken out: give the "
            "original one with --base"
        )
    if not wanted.verify:
        return None
    try:
        return adapter_dir.find_base(named, download=False)
    except BaseNotFound:
        return None


def check_base(folder: Path, source: Source, base: Path, digest: str) -> None:
    """Raise WrongBase unless the adapter belongs to `base`."""
    adapter_dir.check_base(folder, source.base.get("digest"), digest)
    shapes = adapter_dir.base_shapes(base)
    if source.config.get("fan_in_fan_out"):  # GPT-2's layers store their weights the other way round
        shapes = {module: (d_out, d_in) for module, (d_in, d_out) in shapes.items()}
    adapter_dir.check_shapes(folder, {m: (shape.d_out, shape.d_in) for m, shape in source.shapes.items()}, shapes)
    if source.residual is not None:
        originals, residuals = (adapter_dir.base_weights(model) for model in (base, source.residual.folder))
        for module, (a0, b0) in source.residual.start.items():
            name, start = f"{module}.weight", b0 @ a0
            weight = originals[name].float()
            residual = residuals[name].float() if name in residuals else torch.empty(0)
            if source.config.get("fan_in_fan_out"):
                start = start.T
            same = residual.shape == weight.shape
            if not same or not float((weight - residual - start).norm()) <= _SAME * float(weight.norm()):
                raise WrongBase(f"{module!r} of the residual model and its start do not add up to that of {base}")


def _dtype(source: Source, identity: Json, asked: str) -> torch.dtype:
    chosen = asked
    if asked == "auto" and source.plain is not None:
        return next(iter(source.plain.layers.values()))[0].dtype
    if asked == "auto":
        chosen = identity.get("dtype", "float32")
    if chosen not in DTYPES:
        raise AdapterError(f"the base is stored in {chosen}: choose --dtype {', '.join(DTYPES)}")
    return DTYPES[chosen]


def _short(figure: float) -> float:
    """Return a measured figure without the digits in which machines differ."""
    return float(f"{figure:.3g}")


def _all_short(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figure if isinstance(figure, int) else _short(figure) for name, figure in figures.items()}


def _bar(progress: Progress, name: str, layers: int) -> Callable[[], None]:
    return partial(progress.advance, progress.add_task(name, total=layers))


_CARD = """---
base_model: {base}
library_name: peft
tags: [lora, astra]
---
# LoRA of rank {rank}

Converted by `{tool}`. It is a standard LoRA against the original weights of `{base}` ({digest}): PEFT, vLLM and every
other LoRA server load it as it is. `astra.json` says where it came from, how far it is from what was trained, and what
to expect of it.
"""


def _card(provenance: Json) -> str:
    base = provenance["base"]
    return _CARD.format(**{**provenance, "base": base["id"], "digest": base.get("digest", "digest unknown")})
