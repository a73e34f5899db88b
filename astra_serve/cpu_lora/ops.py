"""LoRA over rows grouped by adapter slot, as PyTorch operators: compiled models call them like any other operator.

The data that change from step to step are in tensors (`Groups` of the wrapper describes `rows`, `starts` and
`ranks`), so one compiled model serves every mix of adapters. Products are taken in the weights' dtype (with
B, in the output's where that is wider); the CPU kernels accumulate in float32, and the change is added before rounding.
"""

import hashlib
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from converter import atomic

logger = logging.getLogger(f"vllm.{__name__}")

SOURCE = Path(__file__).with_name("grouped_lora.cpp")
FLAGS = "-O3 -std=c++20 -fPIC -shared -fopenmp -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma".split()

_GROUPS = "Tensor rows, Tensor starts, Tensor ranks"
library = torch.library.Library("astra", "DEF")
library.define(f"lora_linear(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, {_GROUPS}, float scale) -> ()")
library.define(f"lora_linear_avx512(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, {_GROUPS}, float scale) -> ()")
library.define(f"lora_shrink(Tensor(a!)[] inner, Tensor x, Tensor[] a, {_GROUPS}, float scale) -> ()")
library.define(
    f"lora_expand(Tensor(a!) y, Tensor[] inner, Tensor[] b, {_GROUPS}, int[] widths, int offset, bool add) -> ()"
)
lora_linear, lora_shrink, lora_expand = (
    torch.ops.astra.lora_linear.default,
    torch.ops.astra.lora_shrink.default,
    torch.ops.astra.lora_expand.default,
)

Tensors = list[torch.Tensor]
Rows = slice | torch.Tensor


def fastest_lora_linear() -> Callable[..., None]:
    """Return the fastest form of `lora_linear` that this machine has, compiling it where that is still to be done.

    One line in the log says why when it is not the AVX-512 one.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        logger.info("no AVX-512 BF16 on this CPU: LoRA uses PyTorch's matrix products")
        return lora_linear
    try:
        torch.ops.load_library(_compiled())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), str(error))
        logger.warning("LoRA uses PyTorch's matrix products: the faster kernel cannot be compiled here: %s", reason)
        return lora_linear
    fast: Callable[..., None] = torch.ops.astra.lora_linear_avx512.default
    return fast


def _compiled() -> Path:
    """Return the shared library of SOURCE, compiled once per user, PyTorch version and source text."""
    key = hashlib.sha256(f"{torch.__version__} {FLAGS}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "astra"
    library = folder / f"grouped_lora-{key}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "").split() or ["g++"]  # another's OpenMP would fight with PyTorch's
        root = Path(torch.__file__).parent
        includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        logger.info("compiling the CPU LoRA kernel with %s (once, about ten seconds)", compiler[0])
        with atomic.new_file(library) as made:  # several processes may compile at the same time
            command = [*compiler, *FLAGS, *includes, str(SOURCE), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
    return library


@torch.library.impl(library, "lora_linear", "CPU")
def _lora_linear(
    y: torch.Tensor, x: torch.Tensor, a: Tensors, b: Tensors, rows: Any, starts: Any, ranks: Any, scale: float
) -> None:
    """Add scale * B_i A_i x to slice i of y, the slices side by side and as wide as the B_i."""
    for slot, mine, rank in groups(rows, starts, ranks, len(x)):
        x_mine, offset = x[mine], 0
        for a_i, b_i in zip(a, b, strict=True):
            inner = _shrink(x_mine, a_i, slot, rank, scale)
            width = min(b_i.shape[-2], y.shape[1] - offset)
            _expand(y[:, offset : offset + width], mine, inner, b_i, slot)
            offset += width


@torch.library.impl(library, "lora_shrink", "CPU")
def _lora_shrink(inner: Tensors, x: torch.Tensor, a: Tensors, rows: Any, starts: Any, ranks: Any, scale: float) -> None:
    """Set inner[i] to scale * A_i x."""
    for slot, mine, rank in groups(rows, starts, ranks, len(x)):
        for out, a_i in zip(inner, a, strict=True):
            product = _shrink(x[mine], a_i, slot, rank, scale)
            out[mine, : product.shape[1]] = product.to(out.dtype)


@torch.library.impl(library, "lora_expand", "CPU")
def _lora_expand(
    y: torch.Tensor,
    inner: Tensors,
    b: Tensors,
    rows: Any,
    starts: Any,
    ranks: Any,
    widths: list[int],
    offset: int,
    add: bool,
) -> None:
    """Add B_i inner[i] to slice i of y, or put it there; the slices begin at `offset`."""
    for slot, mine, rank in groups(rows, starts, ranks, len(y)):
        at = offset
        for inner_i, b_i, width in zip(inner, b, widths, strict=True):
            _expand(y[:, at : at + width], mine, inner_i[mine, :rank], b_i, slot, add=add)
            at += width


def groups(
    rows: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, n_rows: int
) -> Iterator[tuple[int, Rows, int]]:
    """Yield slot, rows and rank of every slot that has both; consecutive rows as a slice, which indexes uncopied."""
    bounds = starts.tolist()
    if bounds[-1] > n_rows:
        raise RuntimeError(f"the step has {bounds[-1]} rows, the layer {n_rows}")
    for slot, rank in enumerate(ranks.tolist()):
        if rank and bounds[slot] < bounds[slot + 1]:
            mine = rows[bounds[slot] : bounds[slot + 1]].long()
            first, last = int(mine[0]), int(mine[-1])
            yield slot, slice(first, last + 1) if last - first + 1 == len(mine) else mine, rank


def _shrink(x: torch.Tensor, a_stacked: torch.Tensor, slot: int, rank: int, scale: float) -> torch.Tensor:
    """Return scale * A x (n, r) in the dtype of A."""
    a = a_stacked[slot, 0, :rank]
    inner = x.to(a.dtype) @ a.T
    return inner if scale == 1 else inner * scale


def _expand(
    y: torch.Tensor, rows: Rows, inner: torch.Tensor, b_stacked: torch.Tensor, slot: int, *, add: bool = True
) -> None:
    """Add B inner (n, width) to y[rows], or put it there; columns beyond those of B stay (the engine pads some)."""
    b = b_stacked[slot, 0, : y.shape[1], : inner.shape[1]]
    target, dtype = y[:, : len(b)], torch.promote_types(y.dtype, b.dtype)
    before = target[rows].to(dtype) if add else torch.zeros((), dtype=dtype)
    target[rows] = torch.addmm(before, inner.to(dtype), b.T.to(dtype)).to(y.dtype)


for _name in ("lora_linear", "lora_linear_avx512", "lora_shrink", "lora_expand"):
    torch.library.register_fake(f"astra::{_name}", lambda *_: None, lib=library)
