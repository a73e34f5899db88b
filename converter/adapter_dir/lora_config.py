"""The config of a PEFT adapter: of which kind it is, its ranks and alphas as numbers, and why it cannot be served."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.adapter_dir.errors import MalformedAdapter
from converter.adapter_dir.folder import CONFIG, Json
from converter.adapter_dir.patterns import first_matches, names_in, untargeted

MAX_RANK = 4096
# The kinds that adapter_dir reads, with the parts of a layer and the name of alpha in the config.
LORA, DORA, LOHA, LOKR = "LORA", "DORA", "LOHA", "LOKR"
FACTORS = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude_vector"
PARTS = {
    LORA: FACTORS,
    DORA: (*FACTORS, MAGNITUDE),
    LOHA: ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    LOKR: ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
# Extensions of LoRA that PEFT supports and servers do not, with the value that switches each off.
_UNSUPPORTED = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "trainable_token_indices": None,
    "kasa_config": None,
    "arrow_config": None,
    "monteclora_config": None,
}
# Values of init_lora_weights that subtract the initial product B0 A0 from the base's weights.
SUBTRACT_FROM_BASE = ("pissa", "olora", "corda", "lora_ga", "milora", "astra")
_NOT_WEIGHTS = "it adds trained vectors to {}, and changes no weights of the base: no LoRA is equal to it; train a LoRA"
_REASONS = {
    "IA3": "it multiplies activations by trained vectors, a change of full rank and not a low-rank one; merge it into "
    "the base with PEFT's merge_and_unload, or train a LoRA",
    "VERA": "its layers share two random matrices, which the engine cannot load as LoRA factors; merge it into the "
    "base with PEFT's merge_and_unload, or train a LoRA",
    "PREFIX_TUNING": _NOT_WEIGHTS.format("the keys and values of each layer"),
    "PROMPT_TUNING": _NOT_WEIGHTS.format("the prompt's embeddings"),
    "MULTITASK_PROMPT_TUNING": _NOT_WEIGHTS.format("the prompt's embeddings"),
    "P_TUNING": _NOT_WEIGHTS.format("the prompt's embeddings"),
    "CPT": _NOT_WEIGHTS.format("the prompt's embeddings"),
    "ADAPTION_PROMPT": _NOT_WEIGHTS.format("the attention of the last layers"),
}
_OTHER = "its change of the weights is not a product of two small matrices; merge it into the base with PEFT's "
_OTHER += "merge_and_unload, or train a LoRA"


def read_kind(folder: Path, config: Json) -> str:
    """Return LORA, DORA, LOHA or LOKR, the kind of the adapter in `folder` by its config.

    Raises MalformedAdapter for other kinds, with the reason, and for extensions of LoRA that servers do not support.
    """
    found = config.get("peft_type", LORA)
    if found not in (LORA, LOHA, LOKR):
        shown = str(found)[:40]
        reason = _REASONS.get(shown, _OTHER)
        raise MalformedAdapter(
            f"{folder / CONFIG} has peft_type={shown!r}: engines serve plain LoRA only, and {reason}"
        )
    for key, off in _UNSUPPORTED.items():
        if config.get(key) not in (off, None, [], {}):
            raise MalformedAdapter(f"{folder / CONFIG} has {key}={short(config[key])}: engines serve plain LoRA only")
    for name in names_in(config, "target_parameters", str(folder / CONFIG)):
        if not name.endswith(".weight"):
            raise MalformedAdapter(
                f"{folder / CONFIG} has target_parameters={short(name)}: engines serve plain LoRA of linear layers only"
            )
    if found == LORA and config.get("use_dora"):
        return DORA
    return str(found)


def check_config(folder: Path, config: Json, alpha_name: str = "lora_alpha") -> Json:
    """Return the config with whole numbers such as 8.0 as integers.

    Raises MalformedAdapter unless r, alpha, rank_pattern and alpha_pattern have values that PEFT could write.
    """
    where = folder / CONFIG
    rank, alpha = _whole(config.get("r")), config.get(alpha_name)
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise MalformedAdapter(f"{where} needs r, an integer from 1 to {MAX_RANK}, not {str(rank)[:20]}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e9:
        raise MalformedAdapter(f"{where} needs {alpha_name}, a positive number, not {str(alpha)[:20]}")
    found = {**config, "r": rank}
    for key, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        pattern = config.get(key) or {}
        if isinstance(pattern, dict):
            pattern = {name: _whole(value) if kinds == (int,) else value for name, value in pattern.items()}
        if not isinstance(pattern, dict) or not all(type(v) in kinds and 0 < v < 1e9 for v in pattern.values()):
            raise MalformedAdapter(f"{where}: {key} must map module names to positive numbers")
        if key in config:
            found[key] = pattern
    return found


def check_peft_type(folder: Path, config: Json) -> None:
    """Raise MalformedAdapter for a config without peft_type, which PEFT refuses."""
    if "peft_type" not in config:
        raise MalformedAdapter(
            f"{folder / CONFIG} has no peft_type: engines serve plain LoRA only, whose peft_type is 'LORA'"
        )


def resolved(folder: Path, config: Json, ranks: Mapping[str, int | None], alpha_name: str = "lora_alpha") -> Json:
    """Return a checked config whose patterns are the numbers of each module that differ from r and alpha.

    `ranks` are those of the tensors, by module, None where they do not show it. The keys of patterns become ^ and the
    name of a module; r is the largest rank. Raises MalformedAdapter where config and tensors contradict each other.
    """
    where, modules = str(folder / CONFIG), list(ranks)
    expected = _values(config.get("rank_pattern") or {}, modules, config["r"], f"rank_pattern in {where}")
    for module, rank in ranks.items():
        if rank not in (None, expected[module]):
            raise MalformedAdapter(f"{folder}: {module!r} has rank {rank}, but {CONFIG} says {expected[module]}")
    if config.get("ensure_weight_tying") and any(module.endswith("lm_head") for module in modules):
        raise MalformedAdapter(f"{where} has ensure_weight_tying: its change of lm_head is one of the embedding, too")
    if ignored := untargeted(config, modules, where):
        raise MalformedAdapter(
            f"{folder} has tensors of {ignored[0]!r}, which target_modules of its {CONFIG} does not mean: PEFT would "
            "ignore them"
        )
    alphas = _values(config.get("alpha_pattern") or {}, modules, config[alpha_name], f"alpha_pattern in {where}")
    largest = max(expected.values())
    return {
        **config,
        "r": largest,
        "rank_pattern": {f"^{module}": rank for module, rank in expected.items() if rank != largest},
        "alpha_pattern": {f"^{module}": alpha for module, alpha in alphas.items() if alpha != config[alpha_name]},
    }


def unmatched_keys(folder: Path, config: Json, modules: list[str]) -> list[str]:
    """Return the keys of rank_pattern and alpha_pattern that decide for no module: PEFT ignores them."""
    found = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        used = set(first_matches(pattern, modules, f"{name} in {folder / CONFIG}").values())
        found += [key for key in pattern if key not in used]
    return found


def check_init(folder: Path, config: Json) -> None:
    """Raise MalformedAdapter for an adapter that belongs to changed weights of the base, not to the base itself."""
    init = config.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else ""
    if init.startswith(SUBTRACT_FROM_BASE):
        raise MalformedAdapter(
            f"{folder} was trained with init_lora_weights={init[:40]!r}, which subtracts the initial adapter from the "
            f"base: convert it (astra-convert {folder} OUT_DIR --initial DIR, the adapter as it was before training)"
        )
    if init == "loftq":
        raise MalformedAdapter(
            f"{folder} was trained with LoftQ: it belongs to its quantised base, not to the original"
        )


def scaling_of(config: Json) -> float:
    """Return the scaling of a LoraConfig without patterns: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    rank: int = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def short(value: Any) -> str:
    """Return the text of a value of a config, for a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _values(pattern: Json, modules: list[str], default: Any, where: str) -> dict[str, Any]:
    keys = first_matches(pattern, modules, where)
    return {module: pattern[keys[module]] if module in keys else default for module in modules}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
