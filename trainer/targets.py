"""Which layers of a model can be adapted, which are left out, and why.

Adapted are linear layers: `nn.Linear`, and GPT-2's `Conv1D`, whose weight is transposed. Never adapted are the output
head, a classifier's head (it is trained in full), and embeddings. Experts that transformers stacks in one tensor are
adapted where they are named (see `trainer.expert_adapters`).

`target_modules=all-linear` also leaves out:
    - all parts but the language model of a multimodal model, such as its vision tower
    - narrow layers, such as gates: with one output, or narrower than the rank and than an eighth of their other side
    - `kv_b_proj` of multi-head latent attention (DeepSeek): vLLM reads its weights and does not call the layer
    - layers that PEFT does not support: `out_proj` of Mamba, and linear routers of mixtures of experts
"""

from collections.abc import Iterable, Mapping, Sequence

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config import TrainConfig
from trainer.errors import TargetError
from trainer.expert_adapters import expert_targets, names_of_experts
from trainer.experts import expert_tensors, is_meant, taken_for_routers

# Modules in a backbone that belong to a classifier's head: checkpoints of language models have no weights for them.
_POOLER = "pooler"
# The layer of multi-head latent attention whose weights vLLM multiplies into others when it loads the base: it takes a
# LoRA of this layer and does not apply it.
_ABSORBED = "kv_b_proj"


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a linear layer, quantised, adapted or transposed (Conv1D)."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features  # type: ignore[return-value]  # the weight's shape may be packed


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules of a classifier's head, which are trained in full; the outermost ones only."""
    backbone = model.base_model_prefix
    outside = [name for name, module in model.named_children() if name != backbone and _has_parameters(module)]
    poolers = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{backbone}.") and _leaf(name) == _POOLER and _has_parameters(module)
    ]
    return [*poolers, *outside]


def chosen_layers(model: PreTrainedModel, config: TrainConfig) -> dict[str, nn.Module]:
    """Return the linear layers to adapt, by module name; names of experts mean none. Raises TargetError.

    A name of `config.target_modules` means layers of that name, or whose names end with it after a dot. If some of them
    are in a multimodal model's language model, only those are meant.
    """
    layers = _adaptable(model, config)
    language = _language_part(model)
    if config.target_modules == "all-linear":
        found = {
            name: layer
            for name, layer in layers.items()
            if name.startswith(language) and not _is_narrow(layer, config.rank) and _leaf(name) != _ABSORBED
        }
    else:
        experts = expert_targets(model, config)
        targets = [target for target in config.target_modules if target not in experts]
        named = [_layers_named(target, layers, language, model, config) for target in targets]
        if experts and not targets:
            return {}
        found = {name: layer for name, layer in layers.items() if any(name in matching for matching in named)}
    if not found:
        raise TargetError(f"{type(model).__name__} has no linear layer to adapt")
    return found


def left_out(model: PreTrainedModel, config: TrainConfig) -> list[str]:
    """Return one line for each kind of weights that the adapter does not reach and that a user may expect it to."""
    lines = []
    if (experts := expert_tensors(model)) and not expert_targets(model, config):
        share = sum(experts.values()) / sum(parameter.numel() for parameter in model.parameters())
        which = f"{_weights(experts)}; {share:.0%} of all parameters"
        advice = "name experts in target_modules, with method=lora"
        reason = advice if names_of_experts(model) else "PEFT or the engine could not load them"
        lines.append(f"the experts ({which}) are not adapted: {reason}")
    if config.target_modules != "all-linear":
        return lines
    language = _language_part(model)
    linear = _linear(model)
    kept = _kept_by_peft(model, linear)
    adaptable = _adaptable(model, config)
    if outside := sorted({_part(name) for name in linear if not name.startswith(language) and name in adaptable}):
        lines.append(f"only the language model is adapted, without {', '.join(outside)}: name layers of it to adapt it")
    if taken := sorted({_leaf(name) for name in linear if _leaf(name) not in kept}):
        lines.append(f"{', '.join(taken)} are not adapted: PEFT does not support them")
    if any(_leaf(name) == _ABSORBED for name in linear):
        lines.append(f"{_ABSORBED} is not adapted: vLLM computes attention without calling this layer")
    inside = {name: layer for name, layer in adaptable.items() if name.startswith(language)}
    narrow = {_leaf(name): layer_shape(layer) for name, layer in inside.items() if _is_narrow(layer, config.rank)}
    if narrow:
        listed = ", ".join(f"{name} {shape}" for name, shape in sorted(narrow.items()))
        lines.append(f"layers that are too narrow for the rank are not adapted: {listed}")
    return lines


def peft_targets(model: nn.Module, names: Iterable[str], heads: Sequence[str] = ()) -> list[str]:
    """Return PEFT's `target_modules` that match the layers `names` and no other module of `model`.

    PEFT matches ends of names: the last part of a name serves where all modules with it are adapted, else whole names.
    In the modules `heads`, which PEFT trains in full, it matches nothing.
    """
    chosen = set(names)
    others = {_leaf(name) for name, _ in model.named_modules() if name not in chosen and not is_inside(name, heads)}
    return sorted({name if _leaf(name) in others else _leaf(name) for name in chosen})


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Return whether `name` is one of `modules`, or is in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _layers_named(
    target: str, layers: Mapping[str, nn.Module], language: str, model: PreTrainedModel, config: TrainConfig
) -> set[str]:
    """Return the names in `layers` that `target` means, those that begin with `language` first. Raises TargetError."""
    matching = {name for name in layers if is_meant(name, target)}
    if not matching:
        available = ", ".join(sorted({_leaf(name) for name in layers}))
        raise TargetError(f"target_modules: {_refusal(model, config, target)}; available: {available}")
    return {name for name in matching if name.startswith(language)} or matching


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _adaptable(model: PreTrainedModel, config: TrainConfig) -> dict[str, nn.Module]:
    """Return the linear layers that PEFT can adapt by their names, without the output head and a classifier's head."""
    output, linear = model.get_output_embeddings(), _linear(model)
    heads = head_modules(model) if config.task == "classification" else []
    kept = _kept_by_peft(model, linear)
    return {
        name: module
        for name, module in linear.items()
        if module is not output and not is_inside(name, heads) and _leaf(name) in kept
    }


def _kept_by_peft(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the last parts of `names` under which PEFT adapts linear layers of `model`.

    It takes others for routers, and refuses Mamba's `out_proj`: fast kernels read its weight alone.
    """
    leaves = {_leaf(name) for name in names}
    kept = leaves - taken_for_routers(model, leaves)
    for leaf in leaves:
        try:
            _check_lora_target_modules_mamba(LoraConfig(target_modules=[leaf]), model, leaf)
        except ValueError:  # a layer whose forward is skipped
            kept.discard(leaf)
    return kept


def _language_part(model: PreTrainedModel) -> str:
    """Return the beginning of the names of the language model's modules in a multimodal model; else ''."""
    if model.config.is_encoder_decoder or model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def _is_narrow(layer: nn.Module, rank: int) -> bool:
    """Return whether a layer is too narrow for the rank because of its purpose, such as a gate with one output."""
    short, long = sorted(layer_shape(layer))
    return short == 1 or (short < rank and 8 * short <= long)


def _refusal(model: PreTrainedModel, config: TrainConfig, target: str) -> str:
    """Return why no layer can be adapted under the name `target`."""
    modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    named = {name: module for name, module in modules.items() if is_meant(name, target)}
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    experts = expert_tensors(model)
    if any(module is output for module in named.values()):
        if getattr(output, "weight", None) is embedding.weight:
            return (
                f"{target!r} is the output head, which shares its weight with the embedding: it cannot be adapted alone"
            )
        return f"{target!r} is the output head, which is not adapted"
    if config.task == "classification" and any(is_inside(name, head_modules(model)) for name in named):
        return f"{target!r} belongs to the classifier's head, which is trained in full"
    if any(isinstance(module, nn.Linear) for module in named.values()):
        return f"PEFT does not support {target!r} in {model.config.model_type}"
    if experts:
        return (
            f"no linear layer is named {target!r}; the experts are stacked tensors ({_weights(experts)}), and are "
            "adapted as a whole: name experts"
        )
    if named:
        kind = type(next(iter(named.values()))).__name__
        return f"{target!r} is of type {kind}: name linear layers"
    return f"no linear layer is named {target!r}"


def _weights(experts: Iterable[str]) -> str:
    return ", ".join(sorted({_leaf(name) for name in experts if not name.endswith("bias")}))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _part(name: str) -> str:
    """Return the part of a multimodal model in which a layer is: its name up to the first two dots, or one."""
    return ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
