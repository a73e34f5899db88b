"""Packed rows stay apart, or packing is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainer.cli import main
from trainer.errors import ConfigError
from trainer.packing import refuse_leaking, refuse_recurrent

_LINEAR = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")} | {
    f"linear_num_{kind}_heads": 2 for kind in ("key", "value")
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
_APART: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
}
_RECURRENT: dict[str, dict[str, object]] = {
    "qwen3_5_text": {"head_dim": 8, **_LINEAR},
    "lfm2": {"full_attn_idxs": [1]},
    "mamba": {},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "num_hidden_layers": 3},
}
_POSITIONS_OF_THEIR_OWN: dict[str, dict[str, object]] = {"bloom": {"n_head": 4}, "falcon": {"alibi": True}}


def tiny(model_type: str, settings: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = AutoConfig.for_model(model_type, **{"vocab_size": 64, **sizes, **heads, **tokens, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", _APART)
def test_packing_is_allowed_where_a_row_does_not_change_the_next(model_type: str) -> None:
    model = tiny(model_type, _APART[model_type])
    refuse_recurrent(model)
    refuse_leaking(model)


@pytest.mark.parametrize("model_type", _RECURRENT)
def test_packing_is_refused_without_weights_for_recurrent_layers(model_type: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=r"would change the rows .* set packing=false"):
        refuse_recurrent(tiny(model_type, _RECURRENT[model_type]))


@pytest.mark.parametrize("model_type", [*_RECURRENT, *_POSITIONS_OF_THEIR_OWN])
def test_packing_is_refused_where_a_row_is_measured_to_change_the_next(model_type: str) -> None:
    settings = {**_RECURRENT, **_POSITIONS_OF_THEIR_OWN}[model_type]
    with pytest.raises(ConfigError, match=r"would change the rows .* set packing=false"):
        refuse_leaking(tiny(model_type, settings))


@pytest.mark.parametrize("dry", [True, False])
def test_packing_for_a_hybrid_base_gives_one_line_and_writes_nothing(tokenizer, jsonl, tmp_path, capsys, dry) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny("qwen3_5_text", {**_RECURRENT["qwen3_5_text"], "vocab_size": len(tokenizer)}).save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = ["--base", str(base), "--data", str(jsonl([{"text": "one two"}] * 4)), "--out", str(out)]
    assert main([*options, "--packing", "true", *(["--dry-run"] if dry else [])]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "astra-train: packing: in Qwen3_5ForCausalLM a row would change the rows that are packed after it: "
        "set packing=false"
    )
    assert not out.exists()
