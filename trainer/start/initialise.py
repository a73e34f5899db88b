"""From calibration rows to the start of every layer's adapter: the Gram matrices, the subspaces, A0 and B0.

With several processes the vectors are computed by the first and broadcast. A base sharded by FSDP2 is never
gathered as a whole: its layers are, one at a time.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import Progress
from torch import distributed, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.adapter import Start, whole_weight
from trainer.config import TrainConfig
from trainer.data import Batch, Example, batches, digest
from trainer.start import gram_cache
from trainer.start.calibration import Gram, gram_matrices, layer_groups
from trainer.start.eigenspace import Spectrum, eigenvalues, overlap, spectrum, subspace
from trainer.start.methods import astra_start, other_starts
from trainer.start.passes import Passes
from trainer.start.ranks import allocated_ranks, fixed_ranks


@dataclass(frozen=True)
class Estimate:
    """How far the subspaces had moved when the tokens had doubled: mean squared cosines of the principal angles."""

    n_tokens: int
    lowest: float
    median: float


@dataclass(frozen=True)
class Initialisation:
    """Where every layer starts, and what calibration saw on the way (empty for other methods than Astra)."""

    starts: dict[str, Start]
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    eigenvalues: dict[str, torch.Tensor] = field(default_factory=dict)  # with `spectra` set
    convergence: list[Estimate] = field(default_factory=list)


def calibration_batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> list[Batch]:
    """Return a seeded sample of the training rows."""
    sample = random.Random(config.seed).sample(list(examples), min(config.calibration_rows, len(examples)))
    return batches(sample, max(1, config.batch_size // config.gradient_accumulation), tokenizer)


def initialise(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    calibration: list[Batch],
    config: TrainConfig,
    base_digest: str,
    progress: Progress,
) -> Initialisation:
    """Return the start of `config.method` for each of `layers`."""
    shapes = _shapes(layers)
    ranks = fixed_ranks(shapes, config)
    bar = progress.add_task("initialisation", total=len(layers))
    if config.method != "astra":
        advance = partial(progress.advance, bar)
        return Initialisation(other_starts(model, layers, ranks, calibration, config, advance))

    values: dict[str, torch.Tensor] = {}
    if config.rank_allocation != "none":
        for name, gram in _measured(model, layers, ranks, calibration, config, base_digest, progress, []):
            values[name] = _eigenvalues_once(gram, whole_weight(layers[name]))
        ranks = allocated_ranks(values, shapes, config)

    found = Initialisation({}, eigenvalues=values)
    for name, gram in _measured(model, layers, ranks, calibration, config, base_digest, progress, found.convergence):
        weight = whole_weight(layers[name])  # every process takes part when the base is sharded
        q = _subspace_once(gram, weight, ranks[name], config, list(layers).index(name))
        found.starts[name] = astra_start(weight, q)
        found.spectra[name] = spectrum(gram, weight, q)
        if config.spectra and name not in values:
            values[name] = _eigenvalues_once(gram, weight)
        progress.advance(bar)
    return found


def spectra_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    weight_of: Callable[[str], torch.Tensor],
    calibration: list[Batch],
    config: TrainConfig,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Return all eigenvalues of the outputs of `layers`, whose weights with their adapters `weight_of` gives."""
    groups = list(layer_groups(_shapes(layers), config.calibration_memory))
    bar = progress.add_task("spectra", total=len(groups) * _rounds(calibration))
    passes = Passes(model, calibration)
    found = {}
    for group in groups:
        chosen = {name: layers[name] for name in group}
        grams = gram_matrices(passes, chosen, on_batch=partial(progress.advance, bar))
        for name in group:
            found[name] = eigenvalues(grams.pop(name), weight_of(name)).float()
    return found


def _measured(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    calibration: list[Batch],
    config: TrainConfig,
    base_digest: str,
    progress: Progress,
    convergence: list[Estimate],
) -> Iterator[tuple[str, Gram]]:
    """Yield every layer's Gram matrix, one group of layers in memory at a time; append to `convergence`."""
    groups = list(layer_groups(_shapes(layers), config.calibration_memory))
    bar = progress.add_task("calibration", total=len(groups) * _rounds(calibration))
    cache = _cache(calibration, config, base_digest, str(model.dtype))
    passes = Passes(model, calibration)
    for group in groups:
        cached = [gram_cache.fetch(cache, name, model.device) for name in group] if cache else []
        grams = {name: gram for name, gram in zip(group, cached, strict=False) if gram is not None}
        if not _everywhere(len(grams) == len(group)):
            watch = (
                None if cache or config.calibration_overlap == 1 else _Convergence(layers, ranks, config, convergence)
            )
            grams = gram_matrices(
                passes,
                {name: layers[name] for name in group},
                answers_only=config.calibration_answers_only,
                on_batch=partial(progress.advance, bar),
                is_enough=watch or (lambda _: False),
            )
            if cache and PartialState().is_main_process:
                gram_cache.store(cache, grams)
        for name in group:
            yield name, grams.pop(name)
    progress.update(bar, completed=len(groups) * _rounds(calibration))


class _Convergence:
    """Decides whether a group's calibration has seen enough: asked again each time the tokens have doubled."""

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        ranks: Mapping[str, int],
        config: TrainConfig,
        history: list[Estimate],
    ) -> None:
        self._layers, self._ranks, self._config, self._history = layers, ranks, config, history
        self._last: dict[str, torch.Tensor] = {}

    def __call__(self, grams: Iterator[tuple[str, Gram]]) -> bool:
        """Whether every subspace that is no null space kept its principal angles since the last call."""
        overlaps = []
        n_tokens = 0
        for name, gram in grams:
            n_tokens = gram.n_tokens
            d_out, d_in = self._layers[name].out_features, self._layers[name].in_features
            if self._config.subspace == "tail" and d_out - min(d_in, n_tokens) >= self._ranks[name]:
                continue  # any basis of the null space is as good as another
            weight = whole_weight(self._layers[name])
            q = _subspace_once(gram, weight, self._ranks[name], self._config, list(self._layers).index(name))
            if name in self._last:
                overlaps.append(overlap(self._last[name], q))
            self._last[name] = q
        if overlaps:
            self._history.append(Estimate(n_tokens, min(overlaps), median(overlaps)))
        return bool(overlaps) and min(overlaps) >= self._config.calibration_overlap


def _subspace_once(gram: Gram, weight: torch.Tensor, rank: int, config: TrainConfig, place: int) -> torch.Tensor:
    """Return Q; what is random in it depends on the layer's `place` among all, whatever the groups."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + place)
    return _once((len(weight), rank), lambda: subspace(gram, weight, rank, config.subspace, generator))


def _eigenvalues_once(gram: Gram, weight: torch.Tensor) -> torch.Tensor:
    return _once((len(gram.matrix),), lambda: eigenvalues(gram, weight).float())


def _once(shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return compute(), float32 of `shape` on the CPU, computed by the main process and broadcast."""
    state = PartialState()
    result = compute() if state.is_main_process else torch.empty(shape)
    if state.num_processes > 1:
        result = result.to(state.device)
        distributed.broadcast(result, src=0)
    return result.cpu()


def _everywhere(holds: bool) -> bool:
    """Whether something holds in every process: they must all calibrate, or none."""
    state = PartialState()
    if state.num_processes == 1:
        return holds
    in_all = torch.tensor(int(holds), device=state.device)
    distributed.all_reduce(in_all, op=distributed.ReduceOp.MIN)
    return bool(in_all)


def _shapes(layers: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of linear or adapted layers."""
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def _rounds(calibration: list[Batch]) -> int:
    processes: int = PartialState().num_processes
    return math.ceil(len(calibration) / processes)


def _cache(calibration: list[Batch], config: TrainConfig, base_digest: str, dtype: str) -> Path | None:
    if config.calibration_cache is None:
        return None
    rows = digest({key: value.tolist() for key, value in batch.items()} for batch in calibration)
    answers = str(config.calibration_answers_only)
    return gram_cache.cache_folder(config.calibration_cache, base_digest, rows, answers, dtype, config.quantization)
