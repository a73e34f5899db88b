"""TRL's own code as the client of a policy port: `python -m tests.support.trl_rollout URL BASE FOLDER`.

It is a process of its own because the import of TRL changes the environment. Nothing of TRL is changed: the client, the
decision to publish adapters, the function that writes them, and the rollout worker's request and its retries. Two
policies of `BASE` are written below FOLDER and loaded: B is zero in the first one. One line of JSON on stdout has what
TRL has read, and how far the log probabilities of each rollout are from those of each policy, computed here.
"""

import asyncio
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import requests
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo.async_grpo_trainer import save_lora_adapter, select_adapter_sync
from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop
from trl.experimental.async_grpo.vllm_client import VLLMClient

NAME, STALENESS, TOKENS = "trl-policy", 4, 12
PROMPT = [5, 9, 17, 33, 65, 129, 12, 40]


def main(url: str, base: str, folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    client = VLLMClient(url, server_timeout=60)
    client.wait_for_server_ready(0.2)
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(bare, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    settings: Any = SimpleNamespace(max_staleness=STALENESS)
    found: dict[str, Any] = {
        "publishes_adapters": select_adapter_sync(client.get_server_info(), model, settings),
        "dtype": client.get_dtype(),
        "max_model_len": client.get_max_model_len(),
        "world_size": client.get_world_size(),
        "deviation": {},
    }
    rollouts = {}
    for version in (1, 2):
        if version == 2:
            train(model)
        publish(client, model, accelerator, Path(folder), version)
        rollouts[version] = asyncio.run(rollout(url, version))
    for policy in (1, 2):
        with model.disable_adapter() if policy == 1 else torch.no_grad():
            for version, (tokens, logprobs) in rollouts.items():
                found["deviation"][f"{version} by {policy}"] = deviation(model, tokens, logprobs)
    client.unload_lora_adapter(f"{NAME}-v1")
    client.unload_lora_adapter("none")  # which is no error
    body = {"model": f"{NAME}-v1", "prompt": PROMPT}
    found["unloaded"] = requests.post(f"{url}/v1/completions", json=body, timeout=60).status_code
    print(json.dumps(found))


def train(model: PeftModel) -> None:
    """Change B, as a step of an optimiser does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


def publish(client: VLLMClient, model: PeftModel, accelerator: Accelerator, folder: Path, version: int) -> None:
    """Write and load a policy, as the trainer does."""
    client.pause()
    save_lora_adapter(model, accelerator, "default", str(folder / f"{NAME}-v{version}"))
    client.load_lora_adapter(f"{NAME}-v{version}", str(folder / f"{NAME}-v{version}"))
    client.resume()


async def rollout(url: str, version: int) -> tuple[list[int], list[float]]:
    """Return the tokens and log probabilities of one turn of the rollout worker."""
    worker: Any = object.__new__(_AsyncRolloutLoop)  # what starts the loop needs a dataset and a reward
    vars(worker).update(
        lora_name=NAME, _model_version_value=SimpleNamespace(value=version), vllm_server_url=url, max_tokens=TOKENS,
        temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, request_timeout=60,
        _counters=defaultdict(float),
    )  # fmt: skip
    async with aiohttp.ClientSession() as session:
        worker.session = session
        tokens, logprobs = await worker._generate_one_turn(PROMPT)
    return tokens, logprobs


@torch.no_grad()
def deviation(model: PeftModel, tokens: list[int], logprobs: list[float]) -> float:
    """Return the mean difference of sampled log probabilities from those of `model`, in nats."""
    logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((own - torch.tensor(logprobs)).abs().mean())


if __name__ == "__main__":
    main(*sys.argv[1:])
