"""Fixtures that several packages' tests share: a tiny base model, data files, adapters."""

import json
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trainer.embedded
from trainer.embedded.corpus import documents
from trainer.embedded.pretrain import train_tokenizer

EMBEDDED = Path(trainer.embedded.__file__).parent / "base"


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell ignores SIGINT for what it starts in the background, and what a test starts would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded base's tokenizer recipe on little text: it does not depend on the shipped weights."""
    return train_tokenizer(islice(documents(0), 500))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A two-layer Llama with random weights, 32 wide, in float32; training it takes seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("base") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[list[Any]], Path]:
    """Write rows (anything JSON) to a file and return its path."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Forty short prompt-completion rows."""
    return [{"prompt": f"{i} plus one is", "completion": f" {i + 1}."} for i in range(40)]


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An S3 service with a bucket; its address is in the environment, as for any client."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("adapters")
        yield "s3://adapters"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
