"""Tiny bases of real architectures with random weights, and the comparison of an adapter with plain PEFT."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from peft import PeftModel
from tokenizers.processors import TemplateProcessing

from converter.adapter_dir import AstraAdapter, load_astra
from converter.adapter_dir.base_names import expert_parts
from converter.cli import main as convert

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
POSITIONS = {"max_position_embeddings": 128}
GROUPS = {"num_key_value_heads": 2, "head_dim": 16}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ENCODERS = ("bert", "roberta", "electra", "deberta-v2", "t5", "bart")


def gemma3(**text: Any) -> hf.PreTrainedModel:
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(
        text_config={**WIDTH, **POSITIONS, **GROUPS, "sliding_window": 16, "query_pre_attn_scalar": 16, **text},
        vision_config={**vision, "hidden_size": 16, "intermediate_size": 24, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def qwen3_5(**text: Any) -> hf.PreTrainedModel:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision["out_hidden_size"] = text.get("hidden_size", WIDTH["hidden_size"])
    config = hf.Qwen3_5Config(
        text_config={**WIDTH, **POSITIONS, **GROUPS, **LINEAR_ATTENTION, "num_hidden_layers": 4,
                     "tie_word_embeddings": True, **text},
        vision_config={**vision, "num_position_embeddings": 16, "patch_size": 4, "temporal_patch_size": 1,
                       "spatial_merge_size": 1},
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.Qwen3_5ForConditionalGeneration(config)


def llava(**text: Any) -> hf.PreTrainedModel:
    vision = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **WIDTH, **POSITIONS, "tie_word_embeddings": False, **text},
        vision_config={"model_type": "clip_vision_model", **vision, "hidden_size": 16, "intermediate_size": 24},
        image_token_index=5,
    )
    return hf.LlavaForConditionalGeneration(config)


def decoder(kind: str, config: str, **settings: Any) -> Callable[..., hf.PreTrainedModel]:
    return lambda **more: getattr(hf, kind)(getattr(hf, config)(**{**WIDTH, **POSITIONS, **settings, **more}))


def encoder(kind: str, **settings: Any) -> Callable[..., hf.PreTrainedModel]:
    def make(**more: Any) -> hf.PreTrainedModel:
        config = hf.AutoConfig.for_model(kind, **{**WIDTH, **POSITIONS, **settings, **more})
        return hf.AutoModelForMaskedLM.from_config(config)

    return make


def seq2seq(kind: str, **settings: Any) -> Callable[..., hf.PreTrainedModel]:
    return lambda **more: hf.AutoModelForSeq2SeqLM.from_config(hf.AutoConfig.for_model(kind, **{**settings, **more}))


MODELS: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "llama": decoder("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=False),
    "gemma3": gemma3,
    "qwen3_5": qwen3_5,
    "llava": llava,
    "gpt2": decoder("GPT2LMHeadModel", "GPT2Config"),
    "opt": decoder("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32),
    "mamba": decoder("MambaForCausalLM", "MambaConfig", state_size=4),
    "mixtral": decoder("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **GROUPS),
    "qwen3_moe": decoder("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, **GROUPS, **MOE),
    "qwen2_moe": decoder(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=4, shared_expert_intermediate_size=16, **GROUPS, **MOE
    ),
    "qwen3_next": decoder(
        "Qwen3NextForCausalLM", "Qwen3NextConfig", num_experts=4, shared_expert_intermediate_size=16, **GROUPS, **MOE,
        **{**LINEAR_ATTENTION, "num_hidden_layers": 4},
    ),
    "glm4_moe": decoder(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1,
        n_group=1, topk_group=1, **GROUPS, **MOE,
    ),
    "deepseek_v3": decoder(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, first_k_dense_replace=1,
        **MOE,
    ),
    "bert": encoder("bert"),
    "roberta": encoder("roberta", type_vocab_size=1),
    "electra": encoder("electra", embedding_size=16),
    "deberta-v2": encoder(
        "deberta-v2", type_vocab_size=0, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
    "t5": seq2seq("t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "bart": seq2seq(
        "bart", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=0, **POSITIONS,
    ),
}  # fmt: skip


def save_base(name: str, folder: Path, tokenizer: hf.PreTrainedTokenizerFast, **settings: Any) -> Path:
    """Write the base `name` of MODELS, and its tokenizer, to the new `folder`; encoders get [CLS] and [SEP]."""
    own = encoder_tokenizer(tokenizer) if name in ENCODERS else tokenizer
    return save_model(partial(MODELS[name], **settings), folder, own)


def save_model(make: Callable[..., hf.PreTrainedModel], folder: Path, tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    """Write the model that `make` returns for the vocabulary of `tokenizer`, and the tokenizer, to the new `folder`."""
    torch.manual_seed(0)
    words = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("pad", "bos", "eos")}
    model = make(**{"vocab_size": len(tokenizer), **words})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # larger than at the start of pre-training: an adapter then has an effect
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder_tokenizer(tokenizer: hf.PreTrainedTokenizerFast) -> hf.PreTrainedTokenizerFast:
    special = {f"{name}_token": f"<{name}>" for name in ("mask", "cls", "sep")}
    special |= {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("pad", "eos")}
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    words = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    ends = [("<cls>", words.cls_token_id), ("<sep>", words.sep_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=ends
    )
    return words


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rename the tensors on disk; those for which `change` returns None are removed."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    renamed = {change(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: t for name, t in renamed.items() if name is not None}, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@torch.no_grad()
def add_change(model: hf.PreTrainedModel, adapter: AstraAdapter) -> None:
    """Add the exact weight change of `adapter` to the weights of its base, in place."""
    experts = expert_parts(model, adapter.layers)
    for name, layer in adapter.layers.items():
        change = adapter.scaling * (layer.b.double() @ layer.a.double() - layer.b0.double() @ layer.a0.double())
        if name in experts:
            parameter, expert, part = experts[name]
            stacked = model.get_parameter(parameter)[expert]
            stacked[part * len(change) : (part + 1) * len(change)] += change.float()
            continue
        module = model.get_submodule(name)
        module.weight += (change.T if isinstance(module, hf.pytorch_utils.Conv1D) else change).float()


class Logits(NamedTuple):
    """Logits of one base for the same tokens: alone, with the exact weight change, and with the LoRA in plain PEFT."""

    base: torch.Tensor
    trained: torch.Tensor
    served: torch.Tensor


def check_against_peft(base: Path, astra: Path, lora: Path, kind: Any = hf.AutoModelForCausalLM) -> None:
    """Convert `astra` to `lora`; PEFT's logits with it must equal those of the base with the exact weight change."""
    assert convert([str(astra), str(lora)]) == 0
    ids = torch.randint(10, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    found = logits(base, astra, lora, ids, kind)
    assert (found.trained - found.base).abs().max() > 1e-2
    torch.testing.assert_close(found.served, found.trained, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def logits(base: Path, astra: Path, lora: Path, ids: torch.Tensor, kind: Any = hf.AutoModelForCausalLM) -> Logits:
    """Return the logits for `ids` (rows, tokens) in float32, of the model that the class `kind` makes of `base`."""
    adapter = load_astra(astra)

    def load() -> hf.PreTrainedModel:
        heads = {"num_labels": 2} if kind is hf.AutoModelForSequenceClassification else {}
        model = kind.from_pretrained(base, dtype=torch.float32, **heads).eval()
        model.config.pad_token_id = 0
        return model

    model = load()
    if model.config.is_encoder_decoder:
        ids = ids.clone()
        ids[:, -1] = model.config.eos_token_id
    before = model(input_ids=ids).logits
    add_change(model, adapter)
    assert not model.load_state_dict(dict(adapter.head), strict=False).unexpected_keys
    trained = model(input_ids=ids).logits
    served = PeftModel.from_pretrained(load(), lora).eval()(input_ids=ids).logits
    return Logits(before, trained, served)
