"""A decoder layer with the widths of an 8B model, the initialisations that `init_cost` compares, and their measurement.

Weights are Gaussian with standard deviation 1 / sqrt(d_in). Each calibration token occurs once. The squared singular
values of the embeddings fall as 1/k, along the axes, because Gaussian weights treat all directions alike. The rows of
v_proj and up_proj shrink in the same way, so that the inputs of o_proj and down_proj have such a spectrum, too; with a
flat spectrum EVA would read hundreds of batches. There is no head, which would be counted once per layer.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from rich.progress import Progress
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from benchmarks import peak_memory
from trainer.adapter import target_layers
from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.start.calibration import gram_matrices
from trainer.start.eigenspace import subspace
from trainer.start.initialise import initialise
from trainer.start.passes import Passes

SEED, RANK, BATCHES, GIB = 0, 16, 8, 2**30
EVA_PASSES = 10  # limit: with vectors of nearly equal eigenvalues EVA may never converge


@dataclass(frozen=True)
class Shape:
    """The widths and number of layers of a model, and the rows and tokens per row of its calibration data."""

    kind: str  # transformers' model type
    intermediate: int
    layers: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rows: int = 128
    length: int = 128

    @property
    def hidden(self) -> int:
        """Return the width of the residual stream: in these models, the sum over all heads."""
        return self.heads * self.head_dim

    def linear(self) -> dict[str, tuple[int, int]]:
        """Return (d_out, d_in) of the seven linear layers of a block."""
        hidden, kv, wide = self.hidden, self.kv_heads * self.head_dim, self.intermediate
        narrow = {
            "q_proj": (hidden, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, hidden),
        }
        return narrow | {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}

    def smaller(self, head_dim: int) -> "Shape":
        """Return the same proportions with narrower heads and fewer tokens, but more tokens than any layer is wide."""
        narrow = self.intermediate * head_dim // self.head_dim
        return replace(self, head_dim=head_dim, intermediate=narrow, rows=32, length=max(32, narrow // 24))


MODELS = {"llama-3-8b": Shape("llama", 14336, layers=32), "qwen3-8b": Shape("qwen3", 12288, layers=36)}
WARM_UP = MODELS["llama-3-8b"].smaller(4)


def build(shape: Shape) -> tuple[PreTrainedModel, list[Batch]]:
    """Return a bfloat16 model with one decoder layer, and calibration batches in which every token occurs once."""
    torch.manual_seed(SEED)
    n_tokens = shape.rows * shape.length
    config = AutoConfig.for_model(
        shape.kind,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=n_tokens,
        max_position_embeddings=shape.length,
        use_cache=False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    model = AutoModel.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()
    for name, layer in target_layers(model, TrainConfig()).items():
        layer.weight.normal_(std=layer.in_features**-0.5)
        if name.endswith(("v_proj", "up_proj")):
            layer.weight.mul_(_power_law(layer.out_features)[:, None])
    model.get_input_embeddings().weight.copy_(torch.randn(n_tokens, shape.hidden).mul_(_power_law(shape.hidden)))
    parts = torch.arange(n_tokens).view(shape.rows, shape.length).chunk(BATCHES)
    return model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in parts]


def _power_law(n: int) -> torch.Tensor:
    """Return n factors (n,) whose squares fall as 1/k and have mean 1."""
    power = torch.arange(1, n + 1).float().rsqrt()
    return power / power.square().mean().sqrt()


def ours(model: PreTrainedModel, batches: list[Batch], *, spectra: bool) -> Any:
    """Run the trainer's own initialisation."""
    config = TrainConfig(rank=RANK, spectra=spectra, seed=SEED)
    return initialise(model, target_layers(model, config), batches, config, "random", Progress(disable=True))


@torch.no_grad()
def keep_everything(model: PreTrainedModel, batches: list[Batch]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A0 and B0 by layer, by the plain form: all output Gram matrices in float32, fully decomposed."""
    layers = target_layers(model, TrainConfig())
    grams = {name: torch.zeros(layer.out_features, layer.out_features) for name, layer in layers.items()}

    def add(name: str, _layer: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        y = output.flatten(0, -2).float()
        grams[name].addmm_(y.T, y)

    handles = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
    forward(model, batches)
    for handle in handles:
        handle.remove()
    starts = {}
    for name, layer in layers.items():
        q = torch.linalg.eigh(grams[name]).eigenvectors[:, :RANK].clone()  # a view would keep all vectors
        starts[name] = (q.T @ layer.weight.float(), q)
    return starts


def corda(model: PreTrainedModel, batches: list[Batch]) -> Any:
    """Run PEFT's CorDA."""
    rows = [{"input_ids": ids[None]} for batch in batches for ids in batch["input_ids"]]  # PEFT's hook expects one row
    config = _lora(model, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    preprocess_corda(model, config, lambda: forward(model, rows))
    return get_peft_model(model, config)


class _Stop(Exception):
    pass


def eva(model: PreTrainedModel, batches: list[Batch]) -> Any:
    """Run PEFT's EVA, which reads the batches until it has converged, but at most EVA_PASSES times."""
    config = _lora(model, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)  # as PEFT recommends
    steps = iter(range(EVA_PASSES * len(batches)))

    def step(peft_model: nn.Module, batch: Batch) -> None:
        if next(steps, None) is None:
            raise _Stop
        peft_model(**batch)

    with suppress(_Stop):
        initialize_lora_eva_weights(adapted, batches, forward_fn=step, show_progress_bar=False)
    return adapted


def _lora(model: PreTrainedModel, **settings: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(target_layers(model, TrainConfig())), **settings)


@torch.no_grad()
def forward(model: PreTrainedModel, batches: list[Batch]) -> None:
    for batch in batches:
        model(input_ids=batch["input_ids"])


CONTESTANTS: dict[str, Callable[[PreTrainedModel, list[Batch]], Any]] = {
    "ours": partial(ours, spectra=False),
    "ours_with_spectra": partial(ours, spectra=True),
    "keep_everything": keep_everything,
    "corda": corda,
    "eva": eva,
}


def in_a_process(shape: Shape, contestant: str) -> dict[str, float]:
    """Return the measurements of a contestant, or of "eigensolver", from a new process that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(eigensolver if contestant == "eigensolver" else measure, shape, contestant).result()


def measure(shape: Shape, contestant: str) -> dict[str, float]:
    """Return seconds, CPU seconds of all cores, peak memory without the model (GiB), and passes over the batches.

    For `ours` also `forward_s`, the seconds of one forward pass over the batches.
    """
    PartialState(cpu=True)
    run = CONTESTANTS[contestant]
    run(*build(WARM_UP))
    model, batches = build(shape)
    tokens: list[int] = []

    def count(_model: nn.Module, _args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        tokens.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)  # before: our passes end before the last layer
    gc.collect()
    peak_memory.reset_peak()
    before, cpu, started = peak_memory.current_bytes(), time.process_time(), time.perf_counter()
    kept = run(model, batches)
    found = {
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,  # much less than cores x seconds: other programs ran
        "peak_gib": (peak_memory.peak_bytes() - before) / GIB,
        "passes": sum(tokens) / (shape.rows * shape.length),
    }
    if contestant.startswith("ours"):
        del kept
        started = time.perf_counter()
        forward(model, batches)
        found["forward_s"] = time.perf_counter() - started
    return found


def eigensolver(shape: Shape, _: str = "") -> dict[str, float]:
    """Return the seconds of our solver and of torch's on q_proj's Gram matrix, and our relative excess of energy."""
    PartialState(cpu=True)
    model, batches = build(shape)
    layer = model.get_submodule("layers.0.self_attn.q_proj")
    gram = gram_matrices(Passes(model, batches), {"q_proj": layer})["q_proj"]
    square = torch.randn(600, 600, dtype=torch.float64)  # a warm-up, wide enough to run the same code
    subspace(replace(gram, matrix=square @ square.T), square, RANK, "tail", torch.Generator().manual_seed(SEED))
    torch.linalg.eigh(square @ square.T)
    started = time.perf_counter()
    q = subspace(gram, layer.weight, RANK, "tail", torch.Generator().manual_seed(SEED)).double()
    subset, started = time.perf_counter() - started, time.perf_counter()
    values, _ = torch.linalg.eigh(gram.matrix)
    full, started = time.perf_counter() - started, time.perf_counter()
    torch.linalg.eigh(gram.matrix.float())
    return {
        "d": len(q),
        "subset_s": subset,
        "full_s": full,
        "full_float32_s": time.perf_counter() - started,
        "excess_energy": float((q * (gram.matrix @ q)).sum() / values[:RANK].sum()) - 1,
    }
