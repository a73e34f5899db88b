"""Generated adapters with a known weight change."""

import torch

from converter.adapter_dir import AstraAdapter, AstraLayer, LoraAdapter, Shape
from converter.sources import Source, astra_source
from converter.stored import choose_rank, stored_lora


def make_layer(d_out: int, d_in: int, rank: int, move: float, seed: int = 0, train_b: bool = True) -> AstraLayer:
    """Return a layer whose trained factors differ from the initial ones by `move`, relative to the initial norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(d_out, d_in) / d_in**0.5
    b0 = torch.linalg.qr(normal(d_out, rank)).Q
    a0 = b0.T @ weight
    a = a0 + move * a0.norm() * normal(rank, d_in) / (rank * d_in) ** 0.5
    b = b0 + (move * b0.norm() * normal(d_out, rank) / (rank * d_out) ** 0.5 if train_b else 0.0)
    return AstraLayer(a=a, b=b, a0=a0, b0=b0)


def make_adapter(layers: dict[str, AstraLayer], alpha: float | None = None) -> AstraAdapter:
    rank = next(iter(layers.values())).a.shape[0]
    config = {"r": rank, "lora_alpha": alpha or rank, "peft_type": "LORA", "target_modules": sorted(layers)}
    base = {"id": "org/base", "digest": "sha256:" + 64 * "0", "dtype": "bfloat16"}
    return AstraAdapter(layers, config, {"method": "astra", "base": base})


def source_of(adapter: AstraAdapter) -> Source:
    shapes = {m: Shape(len(layer.b), layer.a.shape[1], len(layer.a)) for m, layer in adapter.layers.items()}
    return astra_source(adapter, shapes, {"kind": "astra", "method": "astra"})


def to_lora(adapter: AstraAdapter, dtype: torch.dtype, rank: int | None = None) -> LoraAdapter:
    """Return the LoRA that `astra-convert` would write for `adapter`, with all layers in memory."""
    source = source_of(adapter)
    lora = stored_lora(source, choose_rank(source, rank), dtype)
    return LoraAdapter(dict(lora.layers), lora.config, {"base": source.base}, dict(lora.head))
