"""Wrong versions in the rollout benchmark, on the tiny base."""

from pathlib import Path

import pytest
import torch

from benchmarks import rollout
from benchmarks.policies import Policies, Recomputed
from benchmarks.rollout_load import Rollout, _tokens
from converter import adapter_dir
from converter.adapter_dir import LoraAdapter
from tests.astra_serve.stand_in import MODULE

PROMPT, TOKENS = [3, 4, 5], [6, 7, 8, 9]


@pytest.fixture
def policies(tmp_path: Path) -> Policies:
    torch.manual_seed(0)
    layers = {MODULE: (torch.randn(4, 32), torch.randn(32, 4))}
    with adapter_dir.new_folder(tmp_path / "trained") as partial:
        adapter_dir.save_lora(partial, LoraAdapter(layers, {"r": 4, "lora_alpha": 8}, {}))
    return Policies(tmp_path / "trained", tmp_path / "policies")


def sampled(base: Path, policies: Policies, number: int) -> list[float]:
    """Return the log probabilities of TOKENS by a policy, with its weights merged by hand."""
    model = Recomputed(base, policies)._model
    (a, b), layer = policies.layers(number)[MODULE], model.get_submodule(MODULE)
    with torch.no_grad():
        layer.weight += 2.0 * b @ a
        logits = model(torch.tensor([PROMPT + TOKENS])).logits[0, len(PROMPT) - 1 : -1]
    return [float(row[token]) for row, token in zip(logits.log_softmax(-1), TOKENS, strict=True)]


def test_a_rollout_of_another_policy_than_its_answer_names_is_wrong(tiny_base, policies, monkeypatch) -> None:
    monkeypatch.setattr(rollout, "MOST_DEVIATION", 1e-4)  # the tiny base says nearly the same with every policy
    versions = {1: "policy-v1@aa", 2: "policy-v2@bb"}

    def wrong(model: str, asked: int, by: int) -> int:
        one = Rollout(asked, model, PROMPT, TOKENS, sampled(tiny_base, policies, by), 0.0, 1.0)
        return int(rollout.compare([one], versions, Recomputed(tiny_base, policies))["wrong_version"])

    assert wrong("policy-v1@aa", asked=1, by=1) == 0
    assert wrong("policy-v2", asked=2, by=2) == 0
    assert wrong("policy-v2@bb", asked=2, by=1) == 1  # other weights
    assert wrong("policy-v1@aa", asked=2, by=2) == 1  # another name


def test_a_policy_is_the_same_each_time_and_differs_from_the_next(policies) -> None:
    folder = policies.write(7)
    written = adapter_dir.load_lora(folder).layers[MODULE][1]
    assert torch.equal(written, policies.layers(7)[MODULE][1])
    assert not torch.equal(written, policies.layers(8)[MODULE][1])
    policies.remove(7)
    assert not folder.exists()


def test_tokens_are_counted_in_the_phases_in_which_they_were_sampled() -> None:
    rollouts = [Rollout(1, "p", [], [1, 2, 3, 4], [], sent, sent + 2.0) for sent in (0.0, 3.0)]
    assert [_tokens(rollouts, a, b) for a, b in ((0.0, 2.0), (0.0, 1.0), (2.0, 3.0), (4.0, 9.0))] == [
        4.0,
        2.0,
        0.0,
        2.0,
    ]
