"""Random adapters, and settings for several engines on one small machine."""

from pathlib import Path

import pytest
import torch

from astra_serve.adapters.admission import open_base
from converter import adapter_dir
from converter.adapter_dir import LoraAdapter
from tests.support import demo


def write_random_lora(folder: Path, seed: int) -> Path:
    """Write a random LoRA that changes the answers of the embedded base, and return its folder."""
    torch.manual_seed(seed)
    base = open_base(str(demo.BASE))
    layers = {
        module: (torch.randn(8, d_in) / d_in**0.5, torch.randn(d_out, 8) / 8**0.5)
        for module, (d_out, d_in) in base.shapes.items()
        if module.endswith("down_proj")
    }
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["down_proj"]}
    with adapter_dir.new_folder(folder) as partial:
        adapter_dir.save_lora(partial, LoraAdapter(layers, config, {"base": {"digest": base.digest}}))
    return folder


@pytest.fixture
def one_thread_each(monkeypatch) -> None:
    """Let several engines share two cores: threads that are bound to cores would wait for each other in busy loops."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ASTRA_ADMIN_TOKEN", "e2e-token")
