"""TRL's `SFTTrainer`, the trainer of language models, and the subclass that counts exactly correct answers.

Only this module imports TRL; others take `trl` from it. It mends two things of version 1.16:

- The import sets VLLM_LOGGING_LEVEL, which would silence vLLM servers started by this process.
- On a CPU the loss computes the logits of every position, those of the prompt and of padding too. Here it computes the
  logits of the target positions, as on a GPU. With a vocabulary of 49,152 tokens that saves a third of a step.
"""

import os
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput

from trainer.evaluate import answers_match

SELECTION = "selection"  # the metric by which ExactMatchTrainer selects the best checkpoint
_VLLM_LOGGING = "VLLM_LOGGING_LEVEL"
_vllm_level = os.environ.get(_VLLM_LOGGING)
import trl  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

if _vllm_level is None:
    os.environ.pop(_VLLM_LOGGING, None)
assert callable(trl_utils._use_triton), "TRL chooses the scored positions in another place now"
trl_utils._use_triton = lambda _device: True  # the kernels themselves ask `trl.kernels.chunked_logprob`

__all__ = ["SELECTION", "ExactMatchTrainer", "SFTConfig", "SFTTrainer", "trl"]


class ExactMatchTrainer(SFTTrainer):
    """SFTTrainer whose evaluation also has the share of rows with an exactly correct greedy answer.

    Checkpoints are selected by this share; among those without any correct answer, by the loss.
    """

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Return TRL's metrics, and `exact_match` and `selection` of all processes' rows."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        hits = [
            self.accelerator.gather_for_metrics(answers_match(self.model, batch))
            for batch in self.get_eval_dataloader()
        ]
        share = float(torch.cat(hits).float().mean())
        output.metrics[f"{metric_key_prefix}_exact_match"] = share
        output.metrics[f"{metric_key_prefix}_{SELECTION}"] = share or -output.metrics[f"{metric_key_prefix}_loss"]
        return output
