"""Every setting of a training run: one definition with its default and its documentation."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import ConfigError

Subspace = Literal["tail", "principal", "middle", "random"]


class TrainConfig(BaseModel):
    """Settings of one run; keys of `--config FILE.yaml` and of `--set key=value`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(16, ge=1, description="rank r of the adapter; converted with a trained B it serves as 2r")
    alpha: float | None = Field(None, gt=0, description="scaling is alpha / rank; none means alpha = rank, scaling 1")
    subspace: Subspace = Field("tail", description="which eigenvectors of a layer's output activations start B")
    train_b: bool = Field(True, description="false freezes B = Q: the strict subspace, and the LoRA keeps rank r")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="names (or ends of names) of the layers to adapt; all-linear is every one but the head",
    )
    learning_rate: float = Field(4e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of A and B towards where they started")
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the steps with a rising learning rate, then cosine to 0"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    batch_size: int = Field(16, ge=1, description="rows per step")
    steps: int = Field(200, ge=1, description="optimizer steps; the rows are shuffled anew each time they run out")
    max_length: int = Field(512, ge=2, description="tokens per row; longer rows lose their end")
    calibration_rows: int = Field(128, ge=1, description="training rows whose activations are measured before training")
    calibration_memory: float = Field(
        2.0, gt=0, description="GiB that Gram matrices may hold at once; less means more passes"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the frozen base; auto is the one it is stored in. The adapter is float32"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="two runs with the same seed on the same CPU are equal")


def load_config(file: Path | None, overrides: list[str]) -> TrainConfig:
    """Return the settings of a YAML `file`, changed by `overrides` ("key=value"). Raises ConfigError."""
    settings: dict[str, Any] = {}
    if file is not None:
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"config file {file} cannot be read: {_first_line(error)}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"config file {file} is not a list of `key: value` lines")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, not {override!r}")
        settings[key.strip()] = _value(value)
    for key in settings:
        if key not in TrainConfig.model_fields:
            near = difflib.get_close_matches(str(key), TrainConfig.model_fields, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown setting {key!r}: the nearest one is {near!r}")
    try:
        return TrainConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"setting {first['loc'][0]}={first['input']!r}: {first['msg'].lower()}") from error


def describe() -> str:
    """Return one line per setting, for `--help`."""
    lines = []
    for key, field in TrainConfig.model_fields.items():
        default = "none" if field.default is None else str(field.default).lower()
        lines.append(f"  {key:<20} {field.description} (default: {default})")
    return "\n".join(lines)


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set value {text!r} is not YAML: {_first_line(error)}") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 4e-3 as a string
        except ValueError:
            pass
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
