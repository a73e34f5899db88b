"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290): TRL's DPOTrainer on our tokens.

The loss of a pair is -log sigmoid(beta (d - d0)). d is the difference of the answers' log probabilities, chosen minus
rejected, and d0 is that of the base, so that training starts at log 2.
"""

from statistics import fmean
from typing import Any

from transformers.trainer_utils import EvalLoopOutput

from trainer.sft import trl

DPOConfig = trl.DPOConfig


class PreferenceTrainer(trl.DPOTrainer):
    """DPOTrainer for rows that are tokenised (`as_trl`); its evaluation has the share of pairs with d > d0."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Return TRL's metrics, and `accuracy` of all processes' rows."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_accuracy"] = fmean(self._metrics["eval"]["rewards/accuracies"])
        return output
