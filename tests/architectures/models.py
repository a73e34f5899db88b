"""The architectures of the table: tiny models with random weights, in sizes that the engine's attention accepts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import transformers as hf

from tests.trainer import tiny_models
from tests.trainer.tiny_models import LINEAR_ATTENTION, decoder, seq2seq

Kind = Literal["decoder", "mixture of experts", "hybrid", "multimodal, its text", "encoder", "encoder-decoder"]

# The engine's attention on a CPU takes heads of 32, 64, ... numbers; two heads of queries share one of keys.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
GROUPED = {"num_key_value_heads": 1}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 16}


@dataclass(frozen=True)
class Architecture:
    """One row of the table: how a tiny base of it is made, and which of transformers' classes loads it."""

    kind: Kind
    make: Callable[..., hf.PreTrainedModel]  # from vocab_size and the ids of special tokens
    loaded_by: Any = hf.AutoModelForCausalLM
    published_name: Callable[[str], str | None] | None = None  # of a tensor, where save_pretrained writes another one
    published_config: Mapping[str, Any] = field(default_factory=dict)  # that differs from what save_pretrained writes
    has_experts_with_bias: bool = False
    served_in: Literal["float32", "bfloat16"] = "float32"  # the dtype of the engine

    @property
    def is_classifier(self) -> bool:
        """Return whether it is trained as a classifier, since it writes no text."""
        return self.kind in ("encoder", "encoder-decoder")

    @property
    def task(self) -> str:
        """Return the trainer's `task`."""
        return "classification" if self.is_classifier else "causal_lm"


def _causal(kind: Kind, name: str, **settings: Any) -> Architecture:
    return Architecture(kind, decoder(f"{name}ForCausalLM", f"{name}Config", **{**SIZES, **GROUPED, **settings}))


def _decoder(name: str, **settings: Any) -> Architecture:
    return _causal("decoder", name, **settings)


def _experts(name: str, **settings: Any) -> Architecture:
    return _causal("mixture of experts", name, **settings)


def _hybrid(name: str, **settings: Any) -> Architecture:
    return _causal("hybrid", name, **settings)


def _multimodal(make: Callable[..., hf.PreTrainedModel], **text: Any) -> Architecture:
    def tiny(**more: Any) -> hf.PreTrainedModel:
        return make(**{**SIZES, **GROUPED, **text, **more})

    return Architecture("multimodal, its text", tiny)


def _encoder(name: str, **settings: Any) -> Architecture:
    make = tiny_models.encoder(name, **{**SIZES, **settings})
    return Architecture("encoder", make, hf.AutoModelForSequenceClassification)


def _seq2seq(name: str, **settings: Any) -> Architecture:
    return Architecture("encoder-decoder", seq2seq(name, **settings), hf.AutoModelForSequenceClassification)


def _gpt2_name(tensor: str) -> str | None:
    return None if tensor == "lm_head.weight" else tensor.removeprefix("transformer.")


BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128, "decoder_start_token_id": 0,
}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}

ARCHITECTURES: dict[str, Architecture] = {
    "Llama": _decoder("Llama"),
    "Mistral": _decoder("Mistral"),
    "Qwen2": _decoder("Qwen2"),
    "Qwen3": _decoder("Qwen3", head_dim=32),
    "Phi": _decoder("Phi", num_key_value_heads=2),
    "Phi-3": _decoder("Phi3"),
    "Gemma": _decoder("Gemma", head_dim=32),
    "Gemma 2": _decoder("Gemma2", head_dim=32, sliding_window=16, query_pre_attn_scalar=32),
    "Gemma 3 (text)": Architecture(
        "decoder",
        decoder("Gemma3ForCausalLM", "Gemma3TextConfig", **SIZES, **GROUPED, head_dim=32, sliding_window=16,
                query_pre_attn_scalar=32),
    ),
    "GPT-2": Architecture("decoder", decoder("GPT2LMHeadModel", "GPT2Config", **SIZES), published_name=_gpt2_name),
    "GPT-J": _decoder("GPTJ", rotary_dim=16, n_inner=96),
    "GPT-NeoX": _decoder("GPTNeoX"),
    "OPT": _decoder("OPT", ffn_dim=96, word_embed_proj_dim=64),
    "BLOOM": _decoder("Bloom"),
    "Falcon": _decoder("Falcon", num_kv_heads=1, new_decoder_architecture=True),
    "StarCoder2": _decoder("Starcoder2"),
    "OLMo 2": _decoder("Olmo2"),
    "OLMo 3": _decoder("Olmo3", sliding_window=16),
    "Granite": _decoder("Granite"),
    "Command R (Cohere)": _decoder("Cohere", logit_scale=1.0),
    "Command R7B (Cohere2)": _decoder("Cohere2", logit_scale=1.0, sliding_window=16),
    "StableLM": _decoder("StableLm"),
    "SmolLM3": _decoder("SmolLM3"),
    "GLM-4": _decoder("Glm4", head_dim=32),
    "EXAONE 4": _decoder("Exaone4", sliding_window=16),
    "Nemotron": _decoder("Nemotron"),
    "Mixtral": _experts("Mixtral", num_local_experts=4),
    "Qwen2-MoE": _experts("Qwen2Moe", num_experts=4, shared_expert_intermediate_size=32, **EXPERTS),
    "Qwen3-MoE": _experts("Qwen3Moe", head_dim=32, num_experts=4, **EXPERTS),
    "OLMoE": _experts("Olmoe", num_experts=4, num_experts_per_tok=2),
    "PhiMoE": replace(
        _experts("Phimoe", num_local_experts=4), published_config={"architectures": ["PhiMoEForCausalLM"]}
    ),
    "GraniteMoE": _experts("GraniteMoe", num_local_experts=4),
    "gpt-oss": replace(
        _experts("GptOss", head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
        has_experts_with_bias=True,
    ),
    "GLM-4 MoE": _experts(
        "Glm4Moe", head_dim=32, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
        topk_group=1, **EXPERTS,
    ),
    "DeepSeek-V3": replace(
        _experts(
            "DeepseekV3", num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1, q_lora_rank=32,
            kv_lora_rank=512, qk_rope_head_dim=64, v_head_dim=32, qk_nope_head_dim=32, first_k_dense_replace=1,
            topk_method="noaux_tc", scoring_func="sigmoid", **EXPERTS,  # vLLM reads these two of published configs
        ),
        served_in="bfloat16",  # a kernel of vLLM for CPUs that it needs reads no float32
    ),
    "Qwen3-Next": replace(
        _hybrid("Qwen3Next", num_hidden_layers=4, head_dim=32, num_experts=4, shared_expert_intermediate_size=32,
                **EXPERTS, **{**LINEAR_ATTENTION, "linear_key_head_dim": 128, "linear_value_head_dim": 128}),
        served_in="bfloat16",  # vLLM's linear attention on a CPU computes in no other dtype
    ),
    "LFM2": replace(
        _hybrid("Lfm2", full_attn_idxs=[1], block_auto_adjust_ff_dim=False),
        published_config={"conv_dim": 64, "conv_dim_out": 64, "block_dim": 64, "block_ff_dim": 96},
    ),
    "Falcon-H1": _hybrid("FalconH1", mamba_d_ssm=128, **MAMBA),
    "Bamba": _hybrid("Bamba", attn_layer_indices=[1], **MAMBA),
    "Granite 4 (hybrid)": _hybrid(
        "GraniteMoeHybrid", num_local_experts=4, shared_intermediate_size=32, position_embedding_type="rope",
        layer_types=["mamba", "attention"], **MAMBA,
    ),
    "Granite 4 (hybrid, dense)": _hybrid(
        "GraniteMoeHybrid", num_local_experts=0, shared_intermediate_size=96, position_embedding_type="nope",
        layer_types=["mamba", "attention"], **MAMBA,
    ),
    "Jamba": _hybrid(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=16,
        use_mamba_kernels=False,
    ),
    "Mamba 2": _hybrid("Mamba2", num_heads=4, head_dim=32, state_size=16, n_groups=1, chunk_size=16),
    "Gemma 3": _multimodal(tiny_models.gemma3, head_dim=32, query_pre_attn_scalar=32),
    "Qwen3.5": _multimodal(tiny_models.qwen3_5, head_dim=32),
    "LLaVA": Architecture(
        "multimodal, its text", lambda **more: tiny_models.llava(**{**SIZES, **GROUPED, **more}),
        hf.AutoModelForImageTextToText,
    ),
    "BERT": _encoder("bert"),
    "RoBERTa": _encoder("roberta", type_vocab_size=1),
    "ELECTRA": _encoder("electra", embedding_size=32),
    "DeBERTa-v2": _encoder(
        "deberta-v2", type_vocab_size=0, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
    "DistilBERT": _encoder("distilbert", hidden_dim=96),
    "ModernBERT": _encoder("modernbert", local_attention=16),
    "ALBERT": _encoder("albert", embedding_size=32),
    "T5": _seq2seq("t5", **T5),
    "BART": _seq2seq("bart", **BART),
}  # fmt: skip
