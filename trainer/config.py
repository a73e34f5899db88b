"""The settings of a training run: name, type, default, description and rules of each, defined here only."""

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from converter.adapter_dir import GENERATION
from converter.errors import first_line
from trainer.errors import ConfigError
from trainer.exclusions import exclusion

Method = Literal[
    "astra", "lora", "rslora", "pissa", "olora", "corda", "eva", "lora_ga", "milora", "mica", "full"
]  # fmt: skip
Subspace = Literal["tail", "principal", "middle", "random"]


class TrainConfig(BaseModel):
    """Settings of one run: keys of `--config FILE.yaml`, keys of `--set key=value`, and flags of the command line.

    Raises pydantic's ValidationError for an unknown key, an invalid value, or settings that exclude each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # the adapter
    method: Method = Field(
        "astra",
        description="initialisation of the adapter, or full: fine-tune the base itself",
    )
    rank: int = Field(16, ge=1, description="rank r of the adapter; with a trained B the converted LoRA has rank 2r")
    alpha: float | None = Field(None, gt=0, description="scaling is alpha / rank; none means alpha = rank, scaling 1")
    use_rslora: bool = Field(False, description="use the scaling alpha / sqrt(rank) (rank-stabilised LoRA)")
    subspace: Subspace = Field("tail", description="eigenvectors of a layer's output Gram matrix that initialise B")
    train_b: bool = Field(True, description="train B; false keeps B = Q, and the converted LoRA has rank r")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="names, or ends of names, of the layers to adapt, such as q_proj,v_proj, or experts; all-linear is "
        "all but the output head and experts",
    )
    rank_pattern: dict[str, int] = Field(
        {}, description="ranks of the layers whose names match a regular expression, such as {'q_proj|k_proj': 4}"
    )
    rank_allocation: Literal["none", "effective_rank", "tail_energy"] = Field(
        "none",
        description="distribute rank x layers over the layers: in proportion to the effective rank of their outputs, "
        "or so that the subspaces hold the least energy; at most 4 x rank per layer",
    )

    # the data
    task: Literal["causal_lm", "dpo", "classification"] = Field(
        "causal_lm",
        description="what the rows teach: dpo is direct preference optimisation of a language model, from rows of "
        "prompt, chosen and rejected; its reference is the base",
    )
    dpo_beta: float = Field(
        0.1, gt=0, description="weight of the distance to the base in task=dpo: higher values stay closer to it"
    )
    columns: dict[str, str] = Field(
        {}, description="the data's column for a column of ours, such as {prompt: question}"
    )
    split: str = Field("train", description="split of a hub data set")
    max_length: int = Field(
        512, ge=2, description="maximum tokens per row; longer rows are cut at the end, longer prompts left out"
    )
    packing: bool = Field(False, description="put several short rows into one row of max_length tokens (TRL's packing)")
    chat_template: str | None = Field(
        None, description="file with the chat template (Jinja) of training and serving; none means the base's"
    )
    generation: dict[str, float | int | list[int]] = Field(
        {},
        description="defaults for requests to the adapter, such as {temperature: 0, max_new_tokens: 64}; at its "
        "eos_token_id answers end, in training, too",
    )
    eval_data: str | None = Field(None, description="held-out rows: a file or hub data set, as --data")
    eval_share: float = Field(0.0, ge=0, lt=1, description="share of --data to hold out, instead of eval_data")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; none means a tenth of the run")
    eval_metric: Literal["loss", "exact_match", "accuracy"] = Field(
        "loss",
        description="metric of the best checkpoint; exact_match is of greedy answers, accuracy of classes, or "
        "of preferences relative to the base",
    )
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without improvement")
    forgetting_data: str | None = Field(
        None, description="text on which forgetting is measured; none means text that the base generates"
    )
    forgetting_rows: int = Field(32, ge=0, description="rows of that text, 128 tokens each; 0 measures no forgetting")

    # the optimisation
    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="peak learning rate of AdamW; auto chooses it from the gradients before the first step, so that it "
        "lowers the loss by the same amount for every method, rank and base, and prints the rate",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of A and B towards A0 and B0")
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the steps in which the learning rate rises; a cosine to 0 follows"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="global norm to which gradients are clipped")
    batch_size: int = Field(16, ge=1, description="rows per optimizer step, over all processes")
    gradient_accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step; more need less memory")
    steps: int = Field(200, ge=1, description="optimizer steps; the rows are shuffled again for each epoch")

    # the calibration
    calibration_rows: int = Field(128, ge=1, description="training rows used for calibration")
    calibration_answers_only: bool = Field(False, description="calibrate only on tokens that count in the loss")
    calibration_memory: ByteSize = Field(
        ByteSize(2**31), description="memory for Gram matrices at one time, such as 2GiB; less is slower"
    )
    calibration_overlap: float = Field(
        0.99,
        gt=0,
        le=1,
        description="stop calibration when, after twice the tokens, the mean squared cosine of the principal angles "
        "to the previous subspace is at least this in every layer, null spaces not counted; 1 uses all rows",
    )
    calibration_cache: str | None = Field(
        None, description="folder for Gram matrices: another rank or subspace then needs no forward pass"
    )
    spectra: bool = Field(True, description="record all eigenvalues before and after training, for analyze")

    # the machine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the frozen base; auto is the stored dtype. The adapter is always float32"
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="load the base in 8 or 4 bits (needs bitsandbytes)"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations instead of storing them")
    shard_base: bool = Field(
        False, description="shard the base over the processes (FSDP2); each process holds the whole adapter"
    )
    save_steps: int = Field(50, ge=1, description="steps between checkpoints; with held-out rows it is eval_steps")
    report_to: list[str] = Field(
        [], description="experiment trackers: tensorboard (writes to runs/ beside the output), wandb, trackio, ..."
    )
    push_to_hub: str | None = Field(None, description="hub repository (org/name) that receives the finished folder")
    trust_remote_code: bool = Field(
        False, description="run the Python code in the base's folder, if transformers does not know its architecture"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="random seed; the same seed on the same CPU gives the same bytes")

    @field_validator("target_modules", "report_to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Return a list for names that are given as text: `q_proj,v_proj`."""
        if not isinstance(value, str) or value == "all-linear":
            return value
        return [name.strip() for name in value.split(",") if name.strip()]

    @model_validator(mode="after")
    def _combinable(self) -> "TrainConfig":
        """Refuse settings that exclude each other; the message gives the reason."""
        if reason := exclusion(self):
            raise ValueError(reason)
        for name in self.generation:
            if name not in GENERATION:
                near = difflib.get_close_matches(name, GENERATION, n=1, cutoff=0)[0]
                raise ValueError(f"generation has no {name!r}: the nearest name is {near!r}")
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ValueError(f"rank_pattern {pattern!r}: a rank must be at least 1")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rank_pattern {pattern!r} is not a regular expression: {error}") from error
        return self

    @property
    def is_language_model(self) -> bool:
        """Return whether the model writes text; else it is a classifier."""
        return self.task != "classification"

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Return the ids of `generation` at which answers end."""
        found = self.generation.get("eos_token_id", [])
        return frozenset(int(token) for token in (found if isinstance(found, list) else [found]))

    @property
    def scaling(self) -> float:
        """Return s of delta W = s (B A - B0 A0): alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora or self.method == "rslora" else self.rank)


def load_config(file: Path | None, overrides: list[str]) -> TrainConfig:
    """Return the settings of a YAML `file`; `overrides` ("key=value") replace them. Raises ConfigError."""
    settings: dict[str, Any] = {}
    if file is not None:
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"config file {file} cannot be read: {first_line(error)}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"config file {file} must consist of `key: value` lines")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, not {override!r}")
        settings[key.strip()] = _value(value)
    for key, value in settings.items():
        if key not in TrainConfig.model_fields:
            near = difflib.get_close_matches(str(key), TrainConfig.model_fields, n=1, cutoff=0)[0]
            raise ConfigError(f"unknown setting {key!r}: the nearest name is {near!r}")
        if value == "none" and TrainConfig.model_fields[key].default is None:
            settings[key] = None
    try:
        return TrainConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ConfigError(reason) from error
        raise ConfigError(f"setting {first['loc'][0]}={first['input']!r}: {reason[0].lower()}{reason[1:]}") from error


def describe() -> dict[str, tuple[str, list[str] | None]]:
    """Return for each setting its description with the default, and the list of its choices or None."""
    described = {}
    for key, field in TrainConfig.model_fields.items():
        choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
        default = "none" if field.default in (None, [], {}) else str(field.default).lower()
        if isinstance(field.default, ByteSize):
            default = field.default.human_readable(separator="")
        described[key] = (f"{field.description} (default: {default})", choices or None)
    return described


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set value {text!r} is not YAML: {first_line(error)}") from error
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 4e-3 as a string
        except ValueError:
            pass
    return value
