"""The base of an adapter: where it is, what identifies it, and whether the adapter belongs to it."""

import os
from pathlib import Path

import torch

from converter import adapter_dir
from converter.adapter_dir import BaseNotFound, Json, WrongBase
from converter.source import Source

_RESIDUAL_TOLERANCE = 0.05  # share of a weight's norm: residual models are stored in 16 bits


def local_base(source: Source, given: str | None, *, needed: bool) -> Path | None:
    """Return the folder of the base that was given with --base, else of the base that the adapter names.

    A base that the adapter names is not downloaded: None if it is not available locally, or not `needed`. Raises
    BaseNotFound.
    """
    if given is not None:
        return adapter_dir.find_base(given)
    named = source.base.get("id")
    if named is None:
        raise BaseNotFound(
            "the adapter does not name its base, or names a residual model: give the original base with --base"
        )
    if not needed:
        return None
    try:
        return adapter_dir.find_base(named, download=False)
    except BaseNotFound:
        return None


def checked_identity(folder: Path, source: Source, base: Path, given: str) -> Json:
    """Return id, digest and dtype of the base, for the provenance, after the check that the adapter belongs to it.

    `given` is the base as the user named it; the id that the adapter records comes first. Raises AdapterError.
    """
    digest = adapter_dir.base_digest(base)
    check_base(folder, source, base, digest)
    named = os.path.abspath(given) if Path(given).is_dir() else given  # noqa: PTH100  links stay
    return {"id": named, "digest": digest, "dtype": adapter_dir.base_dtype(base)} | source.base


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
