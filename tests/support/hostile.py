"""Adapter folders made to harm: copies of a good one, each with one fault that an admission rule is against."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from converter import adapter_dir
from tests.converter.test_hostile import CONFIGS, FAULTS


def hostile(good: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield what to call it, and a copy of an adapter with one fault: each that an admission rule is against."""
    weights = adapter_dir.LORA_WEIGHTS
    faults = {name: lambda copy, damage=damage: damage(copy, weights) for name, (damage, _) in FAULTS.items()}
    faults |= {name: lambda copy, text=text: write_config(copy, text) for name, (text, _) in CONFIGS.items()}
    faults |= {
        "another base": lambda copy: edit_provenance(copy, lambda p: p["base"].update(digest="sha256:" + 64 * "0")),
        "a forged probe": lambda copy: edit_provenance(copy, forge),
        "no effect": without_effect,
        "too high a rank": lambda copy: with_rank(copy, 100),
        "a layer that the base has not": lambda copy: renamed(copy, "q_proj", "z_proj"),
        "a layer of another shape": lambda copy: renamed(copy, "down_proj", "o_proj"),
        "no config": lambda copy: (copy / adapter_dir.CONFIG).unlink(),
        "no weights": lambda copy: (copy / weights).unlink(),
    }
    for number, (name, damage) in enumerate(faults.items()):
        copy = folder / str(number) / "adapter"
        shutil.copytree(good, copy)
        damage(copy)
        yield name, copy


def write_config(copy: Path, text: str) -> None:
    (copy / adapter_dir.CONFIG).write_text(text, errors="surrogateescape")


def edit_provenance(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = copy / adapter_dir.PROVENANCE
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def forge(provenance: dict[str, Any]) -> None:
    for prompt in provenance["probe"]["prompts"]:
        prompt["adapter"] = prompt["base"]


def without_effect(copy: Path) -> None:
    file = copy / adapter_dir.LORA_WEIGHTS
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(file).items()}, file)
    (copy / adapter_dir.PROVENANCE).unlink()


def with_rank(copy: Path, rank: int) -> None:
    file = copy / adapter_dir.LORA_WEIGHTS
    tensors = load_file(file)
    for name, tensor in tensors.items():
        rows = rank - tensor.shape["lora_B" in name]
        pad = (0, rows) if "lora_B" in name else (0, 0, 0, rows)
        tensors[name] = torch.nn.functional.pad(tensor, pad)
    save_file(tensors, file)
    config = json.loads((copy / adapter_dir.CONFIG).read_text())
    write_config(copy, json.dumps({**config, "r": rank, "lora_alpha": rank}))


def renamed(copy: Path, old: str, new: str) -> None:
    file = copy / adapter_dir.LORA_WEIGHTS
    tensors = {name: tensor for name, tensor in load_file(file).items() if f".{new}." not in name}
    save_file({name.replace(f".{old}.", f".{new}."): tensor for name, tensor in tensors.items()}, file)


def with_weights(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Returns a fault: other weights, and no record that would show it."""

    def damage(copy: Path) -> None:
        file = copy / adapter_dir.LORA_WEIGHTS
        save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)
        (copy / adapter_dir.PROVENANCE).unlink()

    return damage


def one(value: float, where: str) -> Callable[[Path], None]:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if where in name:
            tensor.view(-1)[0] = value
        return tensor

    return with_weights(change)


OVERFLOWING = {
    "one NaN": one(float("nan"), "layers.0.self_attn.v_proj.lora_A"),
    "a NaN in each layer": one(float("nan"), "lora_B"),
    "an infinity": one(float("inf"), "k_proj.lora_B"),
    "both infinities": one(-float("inf"), "lora_A"),
    "only NaN": with_weights(lambda _, tensor: tensor * float("nan")),
    "1e30": one(1e30, "v_proj"),
    "all 1e30": with_weights(lambda _, tensor: torch.full_like(tensor, 1e30)),
    "all 1e5": with_weights(lambda _, tensor: torch.full_like(tensor, 1e5)),
    "all 1000": with_weights(lambda _, tensor: torch.full_like(tensor, 1e3)),
    "1e30 against 1e-30": with_weights(lambda n, tensor: torch.full_like(tensor, 1e30 if "lora_A" in n else 1e-30)),
}
