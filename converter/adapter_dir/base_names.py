"""Names of a base's tensors: on disk, and in the model that transformers makes of them.

transformers renames tensors while it loads a checkpoint: Gemma 3's `language_model.model.layers.0...` becomes
`model.language_model.layers.0...`, GPT-2's `h.0...` becomes `transformer.h.0...`. An adapter names the modules of the
loaded model. The renaming rules are transformers' own (`transformers.conversion_mapping`).

transformers is imported at the first call: its import takes seconds.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadedModules(NamedTuple):
    """The modules of a base by their names in the models that transformers makes of it.

    One base may have several names for a layer: Qwen3.5's `model.language_model.layers.0` is `model.layers.0` in its
    language model, which PEFT adapts, and engines serve the multimodal model. Unknown classes have no names here.
    """

    shapes: dict[str, tuple[int, int]]  # of every matrix of these models that is filled from disk
    models: tuple[frozenset[str], ...]  # all modules with parameters of each model; the language model first
    served: frozenset[str]  # those of the model that config.json names, if it has an output layer: engines know these


class Parameter(NamedTuple):
    """A parameter of a model, and the tensor on disk from which transformers fills it."""

    name: str
    is_stored: bool  # the parameter is that tensor; else it is computed, as experts are stacked and fused layers split


class ExpertPart(NamedTuple):
    """The place of the weight of one layer of one expert in the loaded model, which stacks the experts."""

    parameter: str  # (experts, parts x d_out, d_in)
    expert: int
    part: int  # gate is part 0 of 2, up is part 1


def expert_parts(model: "PreTrainedModel", modules: Iterable[str]) -> dict[str, ExpertPart]:
    """Return the place of each of `modules` that `model` has as a part of stacked experts; they have names on disk."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    stacking = [
        rule
        for rule in rules
        if isinstance(rule, WeightConverter)
        and [type(operation) for operation in rule.operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
    ]
    state, found = model.state_dict(), {}
    for module in modules:
        number = re.search(r"\.experts\.(\d+)\.", module)
        name, source = rename_source_key(f"{module}.weight", renamings, stacking, model.base_model_prefix, state)
        if number and source is not None and name in state:
            patterns = next(rule.source_patterns for rule in stacking if source in rule.source_patterns)
            found[module] = ExpertPart(name, int(number[1]), patterns.index(source))
    return found


def parameters_from(model: "PreTrainedModel", stored: Iterable[str]) -> dict[str, list[Parameter]]:
    """Return the parameters of `model` that transformers fills from each of the tensors `stored` on disk.

    A tensor that the model does not use has none. `model` may be on the meta device.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    found: dict[str, list[Parameter]] = {}
    for tensor in sorted(stored, key=dot_natural_key):  # some rules depend on the order, which is transformers' own
        name, source = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:  # it had the right name; transformers gives it another chance, too
            name, source = rename_source_key(tensor, [], [], prefix, state)
        names = [name]
        if source is not None:
            targets = next(rule.target_patterns for rule in converters if source in rule.source_patterns)
            names = [name.replace(targets[0], target) for target in targets]
        found[tensor] = [Parameter(name, source is None) for name in names if name in state]
    return found


def loaded_modules(folder: Path, stored: Iterable[str]) -> LoadedModules:
    """Return the modules of the loaded base; `stored` are the names of its tensors.

    A base that transformers cannot build without code of its own has none.
    """
    shapes: dict[str, tuple[int, int]] = {}
    models, served = [], frozenset[str]()
    stored = list(stored)
    for model in loadable_models(folder):
        filled = {parameter.name for found in parameters_from(model, stored).values() for parameter in found}
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2 and name in filled:
                shapes.setdefault(name.removesuffix(".weight"), (tensor.shape[0], tensor.shape[1]))
        with_tied = model.named_parameters(remove_duplicate=False)
        models.append(frozenset(name.rpartition(".")[0] for name, _ in with_tied))
        if type(model).__name__ in (model.config.architectures or ()) and model.get_output_embeddings() is not None:
            served = served or models[-1]
    return LoadedModules(shapes, tuple(models), served)


def stored_names(folder: Path, stored: Iterable[str]) -> dict[str, str]:
    """Return the name on disk of each parameter of the loaded base that is one of the tensors `stored`."""
    names: dict[str, str] = {}
    stored = list(stored)
    for model in loadable_models(folder):
        for tensor, parameters in parameters_from(model, stored).items():
            for parameter in parameters:
                if parameter.is_stored:
                    names.setdefault(parameter.name, tensor)
    return names


def language_model_class(config: Any) -> Any:
    """Return the automatic class of transformers that loads a causal language model of `config`, or None.

    Some multimodal models have no class for text alone.
    """
    import transformers

    if config.is_encoder_decoder:
        return None
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return None


def loadable_models(folder: Path) -> tuple["PreTrainedModel", ...]:
    """Return the models, on the meta device, as which transformers loads the base: names and shapes without data.

    They are the language model, the classes that the base's config names, and the classifier; an adapter may have been
    trained on any of them.
    """
    try:
        return _built(folder, (folder / "config.json").read_bytes())
    except OSError:
        return ()


@lru_cache(maxsize=1)  # a conversion asks for the models of its base several times, and each takes a second
def _built(folder: Path, _config: bytes) -> tuple["PreTrainedModel", ...]:
    """Return the models of `loadable_models`; another content of the config, which `_config` is, means other models."""
    import transformers

    models: dict[type, PreTrainedModel] = {}
    with without_messages():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception:  # the checks by the names on disk remain; a config may make transformers raise anything
            return ()
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        classes = [language_model_class(config), *named, transformers.AutoModelForSequenceClassification]
        for kind in filter(None, classes):
            try:
                with torch.device("meta"):
                    model = kind._from_config(config) if kind in named else kind.from_config(config)
            except Exception:  # noqa: S112  the base has no such model
                continue
            models.setdefault(type(model), model)
    return tuple(models.values())


@contextmanager
def without_messages() -> Iterator[None]:
    """Silence transformers' warnings and progress bars: what is wrong is said in one line of ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
