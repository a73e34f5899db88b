"""Settings that exclude each other, and why."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import TrainConfig


def exclusion(config: "TrainConfig") -> str | None:
    """Return why the settings exclude each other, or None where they can be combined."""
    lm, adapter = config.is_language_model, config.method != "full"
    only_astra = config.subspace != "tail" or not config.train_b or config.rank_allocation != "none"
    evaluated = config.eval_data is not None or config.eval_share > 0
    rules = [
        (config.method == "astra" or not only_astra, "subspace, train_b and rank_allocation require method=astra"),
        (adapter or not config.rank_pattern, "method=full has no ranks: remove rank_pattern"),
        (
            not (config.rank_pattern and config.rank_allocation != "none"),
            "rank_pattern and rank_allocation both set ranks: use one of them",
        ),
        (adapter or config.quantization == "none", "quantised weights cannot be trained: set quantization=none"),
        (
            config.quantization == "none" or config.method not in ("corda", "lora_ga"),
            f"{config.method} needs the base's full-precision weights: set quantization=none",
        ),
        (
            not config.shard_base or config.method in ("astra", "lora", "rslora"),
            f"PEFT initialises {config.method} from unsharded weights: it cannot be combined with shard_base",
        ),
        (
            not config.shard_base or config.quantization == "none",
            "quantised weights cannot be sharded: use shard_base or quantization",
        ),
        (
            not config.shard_base or config.task == "causal_lm",
            "shard_base requires task=causal_lm: a classifier's head, and the reference of dpo, are whole",
        ),
        (not config.packing or config.task == "causal_lm", "packing requires task=causal_lm"),
        (lm or not config.calibration_answers_only, "calibration_answers_only requires task=causal_lm or dpo"),
        (
            lm or config.method not in ("eva", "lora_ga"),
            f"PEFT's {config.method} supports language models only: set task=causal_lm or dpo",
        ),
        (
            lm or not (config.chat_template or config.generation),
            "chat_template and generation require task=causal_lm or dpo",
        ),
        (
            adapter or config.task != "dpo",
            "task=dpo compares the adapter with the base, which method=full would change: choose another method",
        ),
        (
            config.task == "dpo" or config.dpo_beta == type(config).model_fields["dpo_beta"].default,
            "dpo_beta requires task=dpo",
        ),
        (
            adapter or not config.generation,
            "method=full writes a whole model with the base's generation_config.json: remove generation",
        ),
        (
            config.eval_metric != "exact_match" or config.task == "causal_lm",
            "exact_match requires task=causal_lm: choose loss or accuracy",
        ),
        (
            config.eval_metric != "accuracy" or config.task != "causal_lm",
            "accuracy requires task=classification or dpo: choose loss or exact_match",
        ),
        (config.eval_data is None or not config.eval_share, "set eval_data or eval_share, not both"),
        (
            evaluated or (config.patience is None and config.eval_metric == "loss"),
            "patience and eval_metric need held-out rows: set eval_data or eval_share",
        ),
        (
            config.batch_size % config.gradient_accumulation == 0,
            "batch_size must be a multiple of gradient_accumulation",
        ),
    ]
    return next((reason for holds, reason in rules if not holds), None)
