"""Adapter folders as other tools write them, built with PEFT, and what PEFT computes with them in float32."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

IDS = torch.arange(5, 125).view(6, 20)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def trained(base: Path, folder: Path, config: PeftConfig | None = None, **save: Any) -> torch.Tensor:
    """Save an adapter whose parameters are not the initial ones; return the logits of PEFT with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied layers, and that it saves embeddings
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or lora())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if any(part in name for part in ("lora_", "hada_", "lokr_")):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            logits = model.eval()(input_ids=IDS).logits
        model.save_pretrained(folder, **save)
    return logits


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **settings})


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    """Return the logits of PEFT with a LoRA on the base."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied layers, and of settings that it does not know
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(input_ids=IDS).logits


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of an adapter other names."""
    tensors = {change(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    """Split the weights of an adapter, as transformers does."""
    tensors = load_file(folder / WEIGHTS)
    keys = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), 1):
        name = f"adapter_model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def with_byte_order_mark(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())


def into_checkpoint(folder: Path, name: str = "checkpoint-500") -> None:
    """Move an adapter into a folder in its folder, as trainers write it."""
    (folder / name).mkdir()
    for file in (WEIGHTS, CONFIG):
        shutil.copy(folder / file, folder / name / file)
        (folder / file).unlink()


def prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda folder: rename(folder, lambda key: prefix + key.removeprefix("base_model.model."))


def replaced(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: rename(folder, lambda key: key.replace(old, new))


def named(name: str) -> Callable[[Path], None]:
    return lambda folder: rename(folder, lambda key: key.replace(".weight", f".{name}.weight"))


# Each is an edit of a saved adapter that changes no number of it.
EDITS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda _: None,
    "name of the adapter": named("default"),
    "other name of the adapter": named("policy_v2"),
    "wrapped twice": prefixed("base_model.model.base_model.model."),
    "no wrapper": prefixed(""),
    "a module of DDP": prefixed("module.base_model.model."),
    "a compiled model": replaced(".self_attn.", "._orig_mod.self_attn."),
    "FSDP": replaced(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "a multimodal model": replaced("model.model.layers", "model.model.language_model.layers"),
    "an older multimodal model": replaced("model.model.layers", "model.language_model.model.layers"),
    "without the output layer": replaced("model.model.layers", "model.layers"),
    "shards": shard,
    "a byte order mark": with_byte_order_mark,
    "floats": lambda folder: edit_config(folder, r=4.0, lora_alpha=6.0),
    "an expression of targets": lambda folder: edit_config(folder, target_modules=r".*\.self_attn\.(q|k|v|o)_proj"),
    "settings of other tools": lambda folder: edit_config(
        folder, enable_lora=None, merge_weights=False, swift_type="x"
    ),
}
# Each is a LoRA that PEFT trains and saves, and how it is saved.
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patterns": (
        {"rank_pattern": {"q_proj": 2, "^model.layers.1.self_attn.k_proj": 6}, "alpha_pattern": {"o_proj": 9}},
        {},
    ),
    "expressions": (
        {
            "rank_pattern": {r".*\.layers\.1\..*(q_proj|v_proj)": 8, "layers.0.self.attn.[kv]_proj": 3},
            "alpha_pattern": {r"model\.layers\.\d+\..*o_proj": 64, "v.proj": 1},
        },
        {},
    ),
    "rsLoRA with expressions": ({"use_rslora": True, "rank_pattern": {"(q|k)_proj": 2}}, {}),
    "a rank that no layer has": ({"r": 16, "rank_pattern": {".*_proj": 3}}, {}),
    "a copied embedding": ({}, {"save_embedding_layers": True}),
    "an untrained head": ({"modules_to_save": ["lm_head"]}, {}),
    "an untrained head and a copied embedding": ({"modules_to_save": ["lm_head"]}, {"save_embedding_layers": True}),
    "the output layer": ({"target_modules": ["q_proj", "lm_head"]}, {}),
    "the output layer without its copy": ({"target_modules": ["q_proj", "lm_head"]}, {"save_embedding_layers": False}),
    "every linear layer": ({"target_modules": "all-linear"}, {}),
}
