"""Convert an adapter folder into a LoRA folder, or a merged model: read, choose the rank, write, read back, verify.

Nothing appears at the output path before every check has passed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress

from converter import adapter_dir
from converter.adapter_dir import ENGINE_RANKS, AdapterError, BaseNotFound, Json, WrongBase
from converter.check_factors import VerificationFailed, check_factors
from converter.merge import merge, save_merged_provenance
from converter.source import Source
from converter.sources import open_source
from converter.stored import DTYPES, Auto, Rank, choose_rank, stored_lora

if TYPE_CHECKING:
    from converter.check_model import Comparison

_RESIDUAL_TOLERANCE = 0.05  # share of a weight's norm: residual models are stored in 16 bits
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
    opened = partial(open_source, folder, initial=options.initial, allow_pickle=options.allow_pickle)
    source = opened()
    base = local_base(source, options)
    if base is not None:
        source = opened(base=base)
    if source.needs_base:
        raise AdapterError(f"{folder}: {source.needs_base}: give it with --base, a model folder or a hub id")
    _check_rank(source, options)
    identity = source.base
    if base is not None:
        digest = adapter_dir.base_digest(base)
        check_base(folder, source, base, digest)
        given = str(options.base)
        named = os.path.abspath(given) if Path(given).is_dir() else given  # noqa: PTH100  links stay
        identity = {"id": named, "digest": digest, "dtype": adapter_dir.base_dtype(base)} | source.base
    if options.merge:
        if options.rank or options.energy or options.fit_engine or options.dtype != "auto" or options.prompts:
            raise AdapterError(
                "--merge adds the whole change to the base, in its dtype: leave options for rank, dtype and prompts out"
            )
        return write_merged(source, base, identity, out, progress)
    dtype = _dtype(source, identity, options.dtype)

    with progress, adapter_dir.new_folder(out) as new:
        comparison = compare(source, base, dtype, options)
        tried: list[Json] = []
        advance = _new_bar(progress, "reading", len(source.factors))
        rank = choose_rank(
            source,
            options.rank,
            options.energy,
            fit_engine=options.fit_engine,
            is_enough=partial(_is_enough, source, dtype, comparison, options.max_kl, tried),
            on_layer=advance,
        )
        lora = stored_lora(source, rank, dtype)
        lora.config["base_model_name_or_path"] = identity.get("id")
        advance = _new_bar(progress, "writing", len(source.factors))
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
        if "id2label" in source.config:
            provenance["id2label"] = source.config["id2label"]
        if source.dropped:
            provenance["dropped"] = list(source.dropped)
        if tried:
            provenance["tried"] = sorted(tried, key=lambda row: row["rank"])
        advance = _new_bar(progress, "checking", len(source.factors))
        provenance |= verify(new, source, rank, dtype, comparison, options.max_kl, advance)
        adapter_dir.save_lora_provenance(new, provenance)
        adapter_dir.copy_chat_files(folder, new)
        (new / "README.md").write_text(_card(provenance), encoding="utf-8")
    return Conversion(source, rank, provenance)


def compare(source: Source, base: Path | None, dtype: torch.dtype, options: Options) -> "Comparison | str":
    """Return the base and the trained model on the prompts, or the reason why they are not compared.

    `dtype` is that of the factors, in which the models are computed if the base's own is unusual. Raises AdapterError.
    """
    if not options.verify:
        return "--no-verify was given"
    from converter import check_model  # imports transformers, which takes seconds

    reason = check_model.reason_not_comparable(source, base)
    if base is None or reason:
        return reason or ""
    served = DTYPES.get(adapter_dir.base_dtype(base), dtype)
    return check_model.Comparison(source, base, served, options.prompts or check_model.DEFAULT_PROMPTS)


def _is_enough(
    source: Source, dtype: torch.dtype, comparison: "Comparison | str", max_kl: float, tried: list[Json], rank: Rank
) -> bool:
    """Return whether the KL with `rank` is at most `max_kl`, and append what was measured to `tried`."""
    if isinstance(comparison, str):
        raise AdapterError(f"--rank auto has to compare the models, but {comparison}: give --rank a number")
    found = comparison.agreement(comparison.served(stored_lora(source, rank, dtype)))
    figures = {"dropped_energy": rank.total_dropped, **asdict(found)}
    tried.append({"rank": rank.stored, **_all_rounded(figures)})
    return found.mean_kl <= max_kl


def verify(
    new: Path,
    source: Source,
    rank: Rank,
    dtype: torch.dtype,
    comparison: "Comparison | str",
    max_kl: float,
    on_layer: Callable[[], None],
) -> Json:
    """Read the LoRA in `new` back and check it; return the fields of the provenance that the checks measured.

    They are `errors`, and `verification` and `probe`, or `unverified` with the reason. Raises AdapterError.
    """
    stored = adapter_dir.load_lora(new)
    errors = check_factors(source, stored, rank, dtype, on_layer)
    found: Json = {"errors": {"relative": _rounded(errors.total), "layers": _all_rounded(errors.layers)}}
    if rank.dropped:
        found["errors"]["dropped_energy"] = _rounded(rank.total_dropped)
        found["errors"]["dropped_energy_by_layer"] = _all_rounded(rank.dropped)
    if isinstance(comparison, str):
        return {**found, "unverified": comparison}
    served = comparison.served(stored)
    agreement = comparison.agreement(served)
    if not agreement.mean_kl <= max_kl:
        raise VerificationFailed(
            f"the served model would differ from the trained one by {agreement.mean_kl:.2g} nats per token (KL), above "
            f"the limit of {max_kl:g}; the adapter's effect is {agreement.effect:.2g}: keep a larger rank, or raise "
            "--max-kl"
        )
    return {**found, "verification": _all_rounded(asdict(agreement)), "probe": comparison.probe(served)}


def write_merged(source: Source, base: Path | None, identity: Json, out: Path, progress: Progress) -> Conversion:
    """Write the base with the adapter added to its weights to the new folder `out`. Raises AdapterError."""
    if base is None:
        raise BaseNotFound("--merge writes the whole model: give --base, a model folder or a hub id")
    provenance = {
        "tool": f"astra-convert {version('astra-serve')}",
        "base": identity,
        "method": source.origin["method"],
        "source": source.origin,
    }
    with progress, adapter_dir.new_folder(out) as new:
        merge(source, base, new, _new_bar(progress, "merging", len(source.factors)))
        save_merged_provenance(new, provenance)
    return Conversion(source, None, provenance)


def local_base(source: Source, options: Options) -> Path | None:
    """Return the folder of the base that was given with --base, else of the base that the adapter names.

    A base that the adapter names is not downloaded: None if it is not available locally, or not needed because of
    --no-verify. Raises BaseNotFound.
    """
    if options.base is not None:
        return adapter_dir.find_base(options.base)
    named = source.base.get("id")
    if named is None:
        raise BaseNotFound(
            "the adapter does not name its base, or names a residual model: give the original base with --base"
        )
    if not options.verify and not source.needs_base:
        return None
    try:
        return adapter_dir.find_base(named, download=False)
    except BaseNotFound:
        return None


def check_base(folder: Path, source: Source, base: Path, digest: str) -> None:
    """Raise WrongBase unless the adapter belongs to `base`: by digest, by shapes, and by the residual model, if any."""
    adapter_dir.check_base(folder, source.base.get("digest"), digest)
    shapes = adapter_dir.base_shapes(base)
    if source.config.get("fan_in_fan_out"):  # GPT-2's layers store transposed weights, its output layer does not
        shapes = {m: shape if m.endswith("lm_head") else (shape[1], shape[0]) for m, shape in shapes.items()}
    adapter_dir.check_shapes(folder, {m: (shape.d_out, shape.d_in) for m, shape in source.shapes.items()}, shapes)
    if source.residual is not None:
        originals, residuals = (adapter_dir.base_weights(model) for model in (base, source.residual.folder))
        for module, (a0, b0) in source.residual.initial.items():
            name, initial = f"{module}.weight", b0 @ a0
            weight = originals[name].float()
            residual = residuals[name].float() if name in residuals else torch.empty(0)
            if source.config.get("fan_in_fan_out"):
                initial = initial.T
            same_shape = residual.shape == weight.shape
            bound = _RESIDUAL_TOLERANCE * float(weight.norm())
            if not same_shape or not float((weight - residual - initial).norm()) <= bound:
                raise WrongBase(f"{module!r}: residual model and initial adapter do not add up to the weight in {base}")


def _check_rank(source: Source, options: Options) -> None:
    """Raise AdapterError where no engine can serve the exact LoRA of a DoRA, LoHa, LoKr or whole layer."""
    exact = max(shape.rank for shape in source.shapes.values())
    chosen = options.rank or options.energy or options.fit_engine or options.merge
    if not source.is_product and exact > ENGINE_RANKS[-1] and not chosen:
        raise AdapterError(
            f"the exact LoRA has rank {exact}, and engines serve at most {ENGINE_RANKS[-1]}: give --rank K, --rank "
            "auto or --energy E; the loss is measured and recorded"
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


def _rounded(figure: float) -> float:
    """Return a measured figure with three significant digits: machines differ in the others."""
    return float(f"{figure:.3g}")


def _all_rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figure if isinstance(figure, int) else _rounded(figure) for name, figure in figures.items()}


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
