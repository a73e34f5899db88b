"""A tiny base on disk, one adapter of each method trained and converted by the command lines, and PEFT's answers."""

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

import trainer.embedded
from astra_serve.adapters.probe import PROMPTS
from converter.cli import main as astra_convert
from tests.architectures.models import Architecture
from tests.architectures.row import Failed
from tests.trainer.tiny_models import edit_json, encoder_tokenizer, logits, rename, save_model
from trainer.base import base_without_weights
from trainer.cli import main as astra_train
from trainer.config import TrainConfig
from trainer.targets import left_out

METHODS = ("astra", "lora", "pissa")
SETTINGS = {"rank": 8, "steps": 3, "batch_size": 4, "max_length": 32, "calibration_rows": 8, "learning_rate": 1e-2}
SETTINGS |= {"forgetting_rows": 0, "spectra": False}
TOLERANCE = 1e-3  # between logits in float32
LEAST_CHANGE = 2e-2  # of logits, by an adapter: so much that a wrong one is noticed
_SHAPES = re.compile(r" \([^)]*\d[^)]*\)")
TEXTS = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}."} for i in range(40)]
CLASSES = [{"text": f"{word} {i}", "label": word} for i in range(16) for word in ["odd" if i % 2 else "even"]]


@dataclass(frozen=True)
class Adapter:
    """A converted adapter, and what its base and plain PEFT with it answer.

    An answer has the log probability of each token after each of PROMPTS (prompts, vocabulary); of a classifier that of
    each class.
    """

    lora: Path
    of_base: torch.Tensor
    of_peft: torch.Tensor
    difference: float  # largest one between PEFT's logits and those of the trained model


def save_base(architecture: Architecture, folder: Path) -> Path:
    """Write a tiny base with the embedded base's tokenizer to the new `folder`, as the hub has it."""
    tokenizer = AutoTokenizer.from_pretrained(Path(trainer.embedded.__file__).parent / "base")
    if architecture.is_classifier:
        tokenizer = encoder_tokenizer(tokenizer)
    save_model(architecture.make, folder, tokenizer)
    if architecture.published_name:
        rename(folder, architecture.published_name)
    edit_json(folder / "config.json", **architecture.published_config)
    return folder


def layers_left_out(architecture: Architecture, base: Path) -> str:
    """Return what `astra-train` says about layers of the base that it does not adapt, without shapes; else ""."""
    labels = ["even", "odd"] if architecture.is_classifier else []
    config = TrainConfig(**SETTINGS, task=architecture.task)
    return "; ".join(_SHAPES.sub("", line) for line in left_out(base_without_weights(base, config, labels), config))


def train_and_convert(architecture: Architecture, base: Path, method: str, folder: Path) -> Path:
    """Train an adapter of `base` and return its LoRA, which is `folder` / METHOD-lora. Raises Failed."""
    data = folder / "data.jsonl"
    rows = CLASSES if architecture.is_classifier else TEXTS
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"method": method, **SETTINGS, "task": architecture.task}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    trained, lora = folder / method, folder / f"{method}-lora"
    _run(astra_train, ["--base", str(base), "--data", str(data), "--out", str(trained), *words])
    _run(astra_convert, [str(trained), str(lora)])
    return lora


def load_in_peft(architecture: Architecture, base: Path, lora: Path) -> Adapter:
    """Load the LoRA of `train_and_convert` in plain PEFT. Raises Failed if its logits are not the trained model's."""
    trained = lora.with_name(lora.name.removesuffix("-lora"))
    found = logits(base, trained, lora, torch.tensor(PROMPTS), architecture.loaded_by)
    difference = float((found.served - found.trained).abs().max())
    change = float((found.trained - found.base).abs().max())
    if not difference <= TOLERANCE:
        raise Failed(f"PEFT's logits differ by {difference:.1e} from those of the trained model")
    if not change >= LEAST_CHANGE:
        raise Failed(f"training changed the logits by {change:.1e} only")
    answers = [
        (values if architecture.is_classifier else values[:, -1]).log_softmax(-1)
        for values in (found.base, found.served)
    ]
    return Adapter(lora, *answers, difference)


def _run(program: Callable[[list[str]], int], words: list[str]) -> None:
    """Run a command line; raise Failed with the reason that it prints if it does not succeed."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        status = program(words)
    print(printed.getvalue(), end="", file=sys.stderr)
    if status:
        raise Failed(printed.getvalue().strip().splitlines()[-1])
