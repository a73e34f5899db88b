"""Adapters without training, and a base of which the output layer can be adapted."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from astra_serve.adapters.admission import open_base
from converter import adapter_dir
from converter.adapter_dir import LoraAdapter
from tests.support import demo

RANK = 8


def write_random_lora(
    folder: Path, *, modules: tuple[str, ...] = ("down_proj",), seed: int = 0, base: Path = demo.BASE
) -> Path:
    """Write a LoRA that changes the answers of `base` at random, in the layers whose names end with `modules`."""
    torch.manual_seed(seed)
    opened = open_base(str(base))
    layers = {
        module: (torch.randn(RANK, d_in) / d_in**0.5, torch.randn(d_out, RANK) / RANK**0.5)
        for module, (d_out, d_in) in opened.shapes.items()
        if module.endswith(modules)
    }
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(modules)}
    with adapter_dir.new_folder(folder) as partial:
        adapter_dir.save_lora(partial, LoraAdapter(layers, config, {"base": {"digest": opened.digest}}))
    return folder


def write_untied_base(folder: Path) -> Path:
    """Write the embedded base with an output layer of its own, of the same weights."""
    shutil.copytree(demo.BASE, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder
