"""An adapter that is served while it is trained: its bytes are uploaded to a server with the real engine."""

import dataclasses
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from astra_serve.client import Client, PublishCallback, calls
from astra_serve.client.tar import Tar
from astra_serve.errors import BadUpload
from tests.e2e.conftest import Admin
from tests.support import demo
from trainer.sft import SFTConfig, SFTTrainer  # an import of TRL before that of this module would silence servers

pytestmark = [pytest.mark.timeout(500), pytest.mark.usefixtures("server")]
TEXT = "one two three four five six seven eight. "


def save_lora(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def test_an_adapter_answers_while_it_is_trained(admin: Admin, client: openai.OpenAI, tmp_path) -> None:
    url = f"http://127.0.0.1:{admin.port}"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo.BASE), config)
    args = SFTConfig(
        str(tmp_path / "out"),
        max_steps=20,
        learning_rate=2e-2,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callback = PublishCallback(url, admin.token, "counting", write_lora=save_lora, every=10, timeout_s=60)
    rows = Dataset.from_list([{"text": TEXT}] * 64)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "publish_version" in entry][-1]
    assert last["publish_step"] == 20
    answer = client.completions.create(model="counting", prompt="one two three", max_tokens=8, temperature=0)
    assert answer.model == last["publish_version"]
    assert answer.choices[0].text.startswith(" four five six")
    with Client(url, admin.token, timeout_s=60) as api:
        assert str(admin.document.parent / "uploads") in api.get("counting").source
        api.remove("counting")


def test_a_refused_upload_is_answered_while_it_is_sent(admin: Admin, tmp_path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**27)
    tar = Tar((("adapter_model.safetensors", large, 2**27),))
    call = dataclasses.replace(calls.publish("large", "/x"), body=None, tar=tar)
    with (
        Client(f"http://127.0.0.1:{admin.port}", admin.token, timeout_s=60) as api,
        pytest.raises(BadUpload, match=r"adapter_model.safetensors has more than .* MiB, the limit for an adapter"),
    ):
        api.ask(call)
