"""What a run leaves beside its weights: provenance, loss curve (JSONL and PNG) and model card."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from converter.adapter_dir import Json, base_digest
from trainer.config import TrainConfig
from trainer.data import data_digest

if TYPE_CHECKING:
    from trainer.train import Point

CARD = """---
base_model: {base}
library_name: astra
tags: [astra, peft]
---
# Astra adapter for {base}

| | |
|---|---|
| method | Astra, {subspace} subspace ({b}), arXiv 2602.19111 |
| rank | {rank}, scaling {scaling:g}, on {layers} layers |
| data | {rows} rows, {data_digest} |
| base | {base}, {base_digest} |
| steps | {steps} of {batch} rows, learning rate {lr:g}, seed {seed} |
| loss | {first:.3f} at the first step, {last:.3f} over the last tenth |

![loss](loss.png)

Make a standard LoRA of it with `astra-convert THIS_FOLDER OUT_DIR`; every setting is in `astra.json`.
"""


def provenance(
    base: str,
    base_folder: Path,
    base_dtype: str,
    data: Path,
    n_rows: int,
    config: TrainConfig,
) -> Json:
    """Return where the adapter comes from: base, data, settings and versions."""
    packages = ("astra-serve", "torch", "transformers", "peft")
    return {
        "method": "astra",
        "base": {"id": base, "digest": base_digest(base_folder), "dtype": base_dtype.removeprefix("torch.")},
        "data": {"file": data.name, "digest": data_digest(data), "rows": n_rows},
        "config": config.model_dump(),
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def write_loss(folder: Path, curve: Sequence["Point"]) -> None:
    """Write one JSON line per step: step, loss, gradient norm before clipping, learning rate."""
    (folder / "loss.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in curve), encoding="utf-8")


def plot_loss(folder: Path, curve: Sequence["Point"]) -> None:
    """Draw the loss and the gradient norm over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [p.step for p in curve]
    axes.plot(steps, [p.loss for p in curve], color="C0", linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", yscale="log")
    axes.yaxis.label.set_color("C0")
    norms = axes.twinx()
    norms.plot(steps, [p.grad_norm for p in curve], color="C1", linewidth=0.8, alpha=0.6)
    norms.set(ylabel="gradient norm before clipping", yscale="log")
    norms.yaxis.label.set_color("C1")
    figure.savefig(folder / "loss.png", dpi=120, metadata={"Software": None})


def write_card(folder: Path, origin: Json, curve: Sequence["Point"]) -> None:
    """Write the model card."""
    config = TrainConfig(**origin["config"])
    tail = curve[-max(1, len(curve) // 10) :]
    text = CARD.format(
        base=origin["base"]["id"],
        subspace=config.subspace,
        b="A and B trained" if config.train_b else "B frozen",
        rank=config.rank,
        scaling=1.0 if config.alpha is None else config.alpha / config.rank,
        layers=len(origin["spectra"]),
        rows=origin["data"]["rows"],
        data_digest=origin["data"]["digest"],
        base_digest=origin["base"]["digest"],
        steps=config.steps,
        batch=config.batch_size,
        lr=config.learning_rate,
        seed=config.seed,
        first=curve[0].loss,
        last=sum(p.loss for p in tail) / len(tail),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
