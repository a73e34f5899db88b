"""Llama models and LoRA adapters with random weights, for measurements that depend only on shapes, such as speed."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from converter.adapter_dir import LoraAdapter, base_shapes, save_lora

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {
    "20M": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "300M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}


def save_llama(folder: Path, size: str) -> None:
    """Write a bfloat16 Llama of SHAPES[size] into `folder`, without a tokenizer."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True, **SHAPES[size])
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def save_random_lora(folder: Path, base: Path, rank: int, seed: int) -> int:
    """Write a LoRA of `rank` on every linear layer of `base` to the new `folder`, and return its parameter count."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for module, (d_out, d_in) in base_shapes(base).items():
        if module.rpartition(".")[2] in LAYERS:
            a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
            layers[module] = ((a / d_in**0.5).bfloat16(), (0.05 * b).bfloat16())
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(LAYERS),
    }
    save_lora(folder, LoraAdapter(layers, config, {}))
    return sum(a.numel() + b.numel() for a, b in layers.values())
