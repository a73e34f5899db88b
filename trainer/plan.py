"""The plan of a run: parameters, memory, ranks and calibration tokens, computed without the weights (`--dry-run`)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from converter import adapter_dir
from trainer.adapter import target_layers
from trainer.base import base_without_weights, load_tokenizer, stop_tokens
from trainer.config import TrainConfig
from trainer.expert_adapters import chosen_experts
from trainer.learning_rate import first_step
from trainer.packing import refuse_recurrent
from trainer.start.calibration import layer_groups
from trainer.start.initialise import calibration_batches
from trainer.start.ranks import fixed_ranks
from trainer.targets import layer_shape, left_out
from trainer.train import fit_to_base, read_data

_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5}


@dataclass(frozen=True)
class Plan:
    """The size of a run; memory is in bytes per process."""

    trainable: int
    base_memory: int
    adapter_memory: int  # A0, B0, dA, dB, gradients and AdamW's two moments
    calibration_memory: int
    activation_memory: int  # estimated from the adapted layers' inputs and outputs
    calibration_groups: int
    calibration_tokens: int
    converted_rank: int | None  # None for full fine-tuning
    epochs: float
    remarks: Mapping[str, int]  # number of rows for each remark, such as rows that were left out
    widths: Counter[tuple[int, int]]  # number of layers for each (d_out, d_in)
    left_out: list[str]  # weights that are not adapted, one line for each kind


def plan(base: str, data: str, config: TrainConfig) -> Plan:
    """Return the plan of `train` with these arguments. Raises the errors of `train` for bad input."""
    folder = adapter_dir.find_base(base, code=config.trust_remote_code)
    tokenizer = load_tokenizer(folder, config)
    rows = read_data(data, tokenizer, config, stop_tokens(folder, config))
    model = base_without_weights(folder, config, rows.labels)
    if config.packing:
        refuse_recurrent(model)
    rows = fit_to_base(rows, data, model, tokenizer, config)
    layers = target_layers(model, config)
    shapes = {name: layer_shape(layer) for name, layer in layers.items()}
    ranks = fixed_ranks(shapes, config)
    full, train_b = config.method == "full", config.train_b and config.method != "mica"
    trainable = sum(ranks[n] * (d_in + d_out * train_b) for n, (d_out, d_in) in shapes.items())
    start = sum(ranks[n] * (d_in + d_out) for n, (d_out, d_in) in shapes.items())
    experts = {} if full else chosen_experts(model, config)
    of_experts = sum(config.rank * n * (d_in + d_out) for n, d_out, d_in in experts.values())
    trainable, start = trainable + of_experts, start + of_experts
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = str(model.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    per_parameter = 4.0 if full else _QUANTISED_BYTES.get(config.quantization, _BYTES[stored])
    processes = PartialState().num_processes
    calibration = calibration_batches(rows.train, tokenizer, config)
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in calibration)
    longest = max(len(example["input_ids"]) for example in rows.train)
    answers = 2 if config.task == "dpo" else 1
    micro = answers * config.batch_size // config.gradient_accumulation // processes
    groups = list(layer_groups(shapes, config.calibration_memory))
    needs_gram = config.method == "astra"
    return Plan(
        trainable=n_parameters if full else trainable,
        base_memory=round(n_parameters * per_parameter / (processes if config.shard_base else 1)),
        adapter_memory=n_parameters * 12 if full else 4 * start + 16 * trainable,
        calibration_memory=max(sum(8 * min(shapes[n]) ** 2 for n in g) for g in groups) if needs_gram else 0,
        activation_memory=round(
            micro * longest * sum(d_in + d_out for d_out, d_in in shapes.values()) * _BYTES[stored]
        ),
        calibration_groups=len(groups) if needs_gram else 0,
        calibration_tokens=n_tokens,
        converted_rank=None if full else _converted_rank(config, max(ranks.values(), default=config.rank)),
        epochs=config.steps * config.batch_size / len(rows.train),
        remarks=rows.remarks,
        widths=Counter(shapes.values()),
        left_out=[] if full else left_out(model, config),
    )


def _converted_rank(config: TrainConfig, rank: int) -> int:
    starts_at_zero = config.method in ("lora", "rslora", "eva", "mica")
    return rank if starts_at_zero or not config.train_b else 2 * rank


def show(found: Plan, config: TrainConfig, console: Console) -> None:
    """Print a plan as a list and a table of the layers' widths."""
    memory = found.base_memory + found.adapter_memory + max(found.calibration_memory, found.activation_memory)
    facts = {
        "trainable parameters": f"{found.trainable:,}",
        "converted rank": "none: full fine-tuning" if found.converted_rank is None else str(found.converted_rank),
        "steps": f"{config.steps} of {config.batch_size} rows: {found.epochs:.1f} epochs",
        "learning rate": _rate(config),
        "calibration": f"{found.calibration_tokens:,} tokens; groups of layers: {found.calibration_groups}",
        "memory (estimate)": f"{_size(memory)}: base {_size(found.base_memory)}, adapter and optimizer "
        f"{_size(found.adapter_memory)}, and the larger of Gram matrices {_size(found.calibration_memory)} "
        f"and activations {_size(found.activation_memory)}",
        **({"rows": "; ".join(f"{n} {remark}" for remark, n in found.remarks.items())} if found.remarks else {}),
    }
    for key, value in facts.items():
        console.print(f"{key:<21} {value}", highlight=False, soft_wrap=True)
    table = Table("outputs", "inputs", "layers", "tokens per output", "tail")
    for (d_out, d_in), n in sorted(found.widths.items()):
        remark = "smallest eigenvalues"
        if d_out > d_in:
            remark = "null space of W: A0 = 0"
        elif found.calibration_tokens < d_out:
            remark = "arbitrary: raise calibration_rows"
        table.add_row(str(d_out), str(d_in), str(n), f"{found.calibration_tokens / d_out:.1f}", remark)
    console.print(table)
    for line in found.left_out:
        console.print(line, highlight=False, soft_wrap=True)


def _rate(config: TrainConfig) -> str:
    if config.learning_rate == "auto":
        return f"auto: printed before the first step, which is to lower the loss by {first_step(config):.2g} nats"
    return f"{config.learning_rate:g}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
