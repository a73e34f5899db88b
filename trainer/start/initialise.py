"""The initialisation: calibration rows -> Gram matrices -> subspaces -> A0 and B0 of every target layer.

Layers are handled in groups whose Gram matrices fit into `calibration_memory`. With several processes, the first one
computes the subspaces and broadcasts them. A base that FSDP2 shards is gathered one layer at a time, never as a whole.
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
from trainer.targets import layer_shape


@dataclass(frozen=True)
class Estimate:
    """One check of the calibration's convergence, after `n_tokens` tokens, about twice those of the last check.

    `lowest` and `median` are taken over the layers of a group, of the mean squared cosines of the principal angles
    between a layer's old and new subspace.
    """

    n_tokens: int
    lowest: float
    median: float


@dataclass(frozen=True)
class Initialisation:
    """The start of every layer, and the records of the calibration, which are empty for other methods than Astra."""

    starts: dict[str, Start]
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    eigenvalues: dict[str, torch.Tensor] = field(default_factory=dict)  # ascending; may be empty (spectra=false)
    convergence: list[Estimate] = field(default_factory=list)


def calibration_batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> list[Batch]:
    """Return a sample of the training rows, drawn with `config.seed`, in batches of one training step's micro-batch."""
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
    """Return the start of `config.method` for each of `layers`. Raises ConfigError and TargetError for the ranks."""
    shapes = _shapes(layers)
    ranks = fixed_ranks(shapes, config)
    bar = progress.add_task("initialisation", total=len(layers))
    if config.method != "astra":
        advance = partial(progress.advance, bar)
        return Initialisation(other_starts(model, layers, ranks, calibration, config, advance))

    values: dict[str, torch.Tensor] = {}
    if config.rank_allocation != "none":
        for name, gram in _grams(model, layers, ranks, calibration, config, base_digest, progress, []):
            values[name] = _broadcast_eigenvalues(gram, whole_weight(layers[name]))
        ranks = allocated_ranks(values, shapes, config)

    found = Initialisation({}, eigenvalues=values)
    for name, gram in _grams(model, layers, ranks, calibration, config, base_digest, progress, found.convergence):
        weight = whole_weight(layers[name])  # a collective operation when the base is sharded
        q = _broadcast_subspace(gram, weight, ranks[name], config, list(layers).index(name))
        found.starts[name] = astra_start(weight, q)
        found.spectra[name] = spectrum(gram, weight, q)
        if config.spectra and name not in values:
            values[name] = _broadcast_eigenvalues(gram, weight)
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
    """Return the min(d_out, d_in) possibly nonzero eigenvalues of each layer's outputs, ascending, float32.

    `layers` are linear or adapted; `weight_of` returns the weight (d_out, d_in) of a layer with its adapter.
    """
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


def _grams(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    ranks: Mapping[str, int],
    calibration: list[Batch],
    config: TrainConfig,
    base_digest: str,
    progress: Progress,
    convergence: list[Estimate],
) -> Iterator[tuple[str, Gram]]:
    """Yield each layer's Gram matrix, with one group of layers in memory; append the checks to `convergence`."""
    groups = list(layer_groups(_shapes(layers), config.calibration_memory))
    bar = progress.add_task("calibration", total=len(groups) * _rounds(calibration))
    cache = _cache(calibration, config, base_digest, str(model.dtype))
    passes = Passes(model, calibration)
    for group in groups:
        cached = [gram_cache.load(cache, name, model.device) for name in group] if cache else []
        grams = {name: gram for name, gram in zip(group, cached, strict=False) if gram is not None}
        if not _on_all_processes(len(grams) == len(group)):
            # A cached matrix serves other ranks and subspaces, so it is made of all rows.
            reads_all_rows = cache is not None or config.calibration_overlap == 1
            check = None if reads_all_rows else _ConvergenceCheck(layers, ranks, config, convergence)
            grams = gram_matrices(
                passes,
                {name: layers[name] for name in group},
                answers_only=config.calibration_answers_only,
                on_batch=partial(progress.advance, bar),
                should_stop=check or (lambda _: False),
            )
            if cache and PartialState().is_main_process:
                gram_cache.store(cache, grams)
        for name in group:
            yield name, grams.pop(name)
    progress.update(bar, completed=len(groups) * _rounds(calibration))


class _ConvergenceCheck:
    """Decides whether the calibration of a group can stop; called each time the number of tokens has doubled."""

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        ranks: Mapping[str, int],
        config: TrainConfig,
        convergence: list[Estimate],
    ) -> None:
        self._layers, self._ranks, self._config, self._convergence = layers, ranks, config, convergence
        self._previous: dict[str, torch.Tensor] = {}

    def __call__(self, grams: Iterator[tuple[str, Gram]]) -> bool:
        """Return whether the subspaces have changed little since the last call; null spaces do not count."""
        overlaps = []
        n_tokens = 0
        for name, gram in grams:
            n_tokens = gram.n_tokens
            d_out, d_in = layer_shape(self._layers[name])
            if self._config.subspace == "tail" and d_out - min(d_in, n_tokens) >= self._ranks[name]:
                continue  # every basis of the null space is equally good
            weight = whole_weight(self._layers[name])
            q = _broadcast_subspace(gram, weight, self._ranks[name], self._config, list(self._layers).index(name))
            if name in self._previous:
                overlaps.append(overlap(self._previous[name], q))
            self._previous[name] = q
        if overlaps:
            self._convergence.append(Estimate(n_tokens, min(overlaps), median(overlaps)))
        return bool(overlaps) and min(overlaps) >= self._config.calibration_overlap


def _broadcast_subspace(gram: Gram, weight: torch.Tensor, rank: int, config: TrainConfig, index: int) -> torch.Tensor:
    """Return Q (d_out, rank) of the layer with this index among all target layers.

    The random numbers depend on the seed and the index only, not on the groups of layers.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    return _broadcast((len(weight), rank), lambda: subspace(gram, weight, rank, config.subspace, generator))


def _broadcast_eigenvalues(gram: Gram, weight: torch.Tensor) -> torch.Tensor:
    return _broadcast((len(gram.matrix),), lambda: eigenvalues(gram, weight).float())


def _broadcast(shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return compute() (float32, `shape`, CPU): the main process computes it and broadcasts it to the others."""
    state = PartialState()
    result = compute() if state.is_main_process else torch.empty(shape)
    if state.num_processes > 1:
        result = result.to(state.device)
        distributed.broadcast(result, src=0)
    return result.cpu()


def _on_all_processes(holds: bool) -> bool:
    """Return whether `holds` is true on all processes: either all of them calibrate, or none."""
    state = PartialState()
    if state.num_processes == 1:
        return holds
    on_all = torch.tensor(int(holds), device=state.device)
    distributed.all_reduce(on_all, op=distributed.ReduceOp.MIN)
    return bool(on_all)


def _shapes(layers: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of linear or adapted layers."""
    return {name: layer_shape(layer) for name, layer in layers.items()}


def _rounds(calibration: list[Batch]) -> int:
    """Return the number of rounds of one pass over the batches; a round is one batch per process."""
    processes: int = PartialState().num_processes
    return math.ceil(len(calibration) / processes)


def _cache(calibration: list[Batch], config: TrainConfig, base_digest: str, dtype: str) -> Path | None:
    """Return the folder of the cached matrices for these rows and this base, or None without a cache."""
    if config.calibration_cache is None:
        return None
    rows = digest({key: value.tolist() for key, value in batch.items()} for batch in calibration)
    answers = str(config.calibration_answers_only)
    return gram_cache.cache_folder(config.calibration_cache, base_digest, rows, answers, dtype, config.quantization)
