"""The policies of `benchmarks.rollout`: one trained adapter plus the noise of a step, and what each of them answers."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from converter import adapter_dir
from converter.adapter_dir import LoraAdapter

NOISE = 2.0  # added to each lora_B, relative to its standard deviation
Layers = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Policies:
    """The policy of each step; the same number gives the same policy."""

    def __init__(self, trained: Path, folder: Path) -> None:
        """`trained` is a LoRA of the base; the policies are written below `folder`."""
        self._lora, self._folder = adapter_dir.load_lora(trained), folder
        self.scaling = float(self._lora.config["lora_alpha"]) / float(self._lora.config["r"])

    def layers(self, number: int) -> Layers:
        """Return lora_A (r, d_in) and lora_B (d_out, r) of each layer."""
        noise = torch.Generator().manual_seed(number)
        return {
            module: (a, b + NOISE * b.std() * torch.randn(b.shape, generator=noise, dtype=b.dtype))
            for module, (a, b) in self._lora.layers.items()
        }

    def write(self, number: int) -> Path:
        """Write the policy of a step as PEFT does, without a record, and return its folder."""
        folder = self._folder / f"v{number}"
        with adapter_dir.new_folder(folder) as partial:
            adapter_dir.save_lora(partial, LoraAdapter(self.layers(number), self._lora.config, {}))
        return folder

    def remove(self, number: int) -> None:
        """Remove the folder of a step."""
        shutil.rmtree(self._folder / f"v{number}", ignore_errors=True)


class Recomputed:
    """The base in float32 with one policy at a time."""

    def __init__(self, base: Path, policies: Policies) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._policies, self._weights = policies, dict[str, torch.Tensor]()

    @torch.no_grad()
    def deviations(
        self, number: int, rollouts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[float]]]
    ) -> list[float]:
        """Return the mean difference of each rollout's log probabilities from the policy's, in nats.

        A rollout is its prompt, its sampled tokens, at least one, and their log probabilities.
        """
        for module, (a, b) in self._policies.layers(number).items():
            layer = self._model.get_submodule(module)
            assert isinstance(layer, nn.Linear)
            before = self._weights.setdefault(module, layer.weight.data.clone())
            layer.weight.data = before + self._policies.scaling * (b.float() @ a.float())
        rows = [torch.tensor([*prompt, *tokens]) for prompt, tokens, _ in rollouts]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right: no token sees what is behind it
        logprobs = self._model(padded).logits.log_softmax(-1)
        found = []
        for row, (prompt, tokens, sampled) in zip(logprobs, rollouts, strict=True):
            at = row[len(prompt) - 1 : len(prompt) + len(tokens) - 1]
            own = at.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
            found.append(float((own - torch.tensor(list(sampled))).abs().mean()))
        return found
