"""The loss of the language models' trainer."""

import torch

from tests.trainer.test_train import astra_train
from trainer.sft import trl_utils  # an import of TRL before that of this module would silence servers


def test_logits_are_computed_at_target_positions_only(tiny_base, jsonl, tmp_path, monkeypatch) -> None:
    scored: list[int] = []
    kernel = trl_utils._ChunkedLogProbFunction

    class Counted:
        @staticmethod
        def apply(hidden: torch.Tensor, *args: object) -> object:
            scored.append(len(hidden))
            return kernel.apply(hidden, *args)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counted)
    short, long = ("ten " * 6, "."), ("ten ", "." * 9)
    for name, (prompt, completion) in {"short": short, "long": long}.items():
        data = jsonl([{"prompt": prompt, "completion": completion}] * 8, f"{name}.jsonl")
        assert astra_train(tiny_base, data, tmp_path / name, "steps=1", "forgetting_rows=0") == 0
    assert scored == [4 * 2, 4 * 10]  # 4 rows: the completion's tokens and the end token
