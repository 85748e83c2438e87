"""Tiny random causal language models of many families: those that sequential heads fit, and those that they do not."""

from typing import Any

from transformers import PreTrainedModel

from .moe_models import LATENT, MOE_FAMILIES, make_random_model

WINDOW = {"sliding_window": 4}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
# The last layer attends, as in most of the released models, and the others have states of their own.
HYBRID = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
SMALL_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
GATED_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}

CORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {},
    "mistral": WINDOW,
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 16},
    "phi3": WINDOW,
    "olmo2": {},
    "smollm3": {},
    "gpt_oss": WINDOW,
    "deepseek_v3": {},
    "glm4_moe": {},
    "gpt2": {},
}
"""Options of the families that every test looks at, beside those of `MOE_FAMILIES`."""

OTHERS: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            *("afmoe", "apertus", "arcee", "aria_text", "axk1", "biogpt", "bitnet", "cohere", "cohere2_moe"),
            *("dbrx", "deepseek_v2", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4"),
            *("exaone_moe", "flex_olmo", "flint", "gemma4", "gemma4_unified_text", "glm", "glm4", "glm4_moe_lite"),
            *("gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "granitemoe", "granite_swa", "granitemoe_swa"),
            *("granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax"),
            *("internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "llama4", "mellum", "minicpm3"),
            *("minimax", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "nanochat", "nemotron"),
            *("olmo", "olmo_hybrid", "olmoe", "persimmon", "phi", "phimoe", "qwen2_moe", "seed_oss", "solar_open"),
            *("stablelm", "vaultgemma", "xglm", "youtu"),
        )
    },
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
    "cohere2": WINDOW,
    "cohere_compass_text": {"rope_parameters": ROPES},
    "cwm": {**WINDOW, "bos_token_id": 0},
    "falcon": {"head_dim": ..., "num_key_value_heads": ...},
    "gemma4_text": {
        **WINDOW,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 40,
        "global_head_dim": 32,
        "num_kv_shared_layers": 0,
    },
    "gpt_neo": {"attention_types": [[["global", "local", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    "granitemoehybrid": {
        **HYBRID,
        **SMALL_MAMBA,
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "position_embedding_type": "rope",
    },
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2},
    "mimo_v2_flash": {
        **WINDOW,
        "num_key_value_heads": 1,
        "n_routed_experts": 8,
        "v_head_dim": 16,
        "rope_parameters": {name: {**ROPE, "partial_rotary_factor": 0.5} for name in ROPES},
    },
    "mixtral": WINDOW,
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "n_groups": 1,
    },
    "olmo3": WINDOW,
    "qwen3_5_text": {
        **HYBRID,
        **GATED_DELTA,
        "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
    },
    "qwen3_next": HYBRID,
    "starcoder2": WINDOW,
}
"""Options of all other families that sequential heads fit."""

NO_STACK = r"is no single stack of decoder layers. Sequential heads need one such stack"
STATE = "is of type 'linear_attention', and not one that attends to earlier tokens. Use parallel heads"
INDEXED = "is of type 'indexed_attention', and not one that attends to earlier tokens. Use parallel heads"
PASSED_BY = r"does not run its trunk \(.*Wrapper\) as a whole, so heads would not see hidden states. Use a model of"
ENCODER: dict[str, Any] = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
}
SPARSE = {
    **LATENT,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "n_group": 1,
    "topk_group": 1,
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # Recurrent and state-space models
    "mamba": ({}, STATE),
    "mamba2": ({"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}, STATE),
    "falcon_mamba": ({}, STATE),
    "bamba": (SMALL_MAMBA, STATE),
    "recurrent_gemma": ({"num_hidden_layers": 2, "lru_width": 32}, STATE),
    "qwen3_next": ({}, STATE),
    "qwen3_5_text": (GATED_DELTA, STATE),
    "falcon_h1": ({}, "is of type 'hybrid', and not one that attends to earlier tokens. Use parallel heads"),
    "lfm2_moe": ({}, "is of type 'conv', and not one that attends to earlier tokens. Use parallel heads"),
    "rwkv": ({}, "RwkvBlock of RwkvForCausalLM takes no attention mask and no cache of keys and values. Use parallel"),
    # Layers that need more of their trunk
    "bloom": ({}, "BloomBlock of BloomForCausalLM takes alibi besides hidden states, which only its trunk makes. Use"),
    "falcon": (
        {"alibi": True, "head_dim": ..., "num_key_value_heads": ...},
        "FalconDecoderLayer of FalconForCausalLM takes alibi besides hidden states, which only its trunk makes.",
    ),
    "mpt": ({}, "MptBlock of MptForCausalLM takes position_bias besides hidden states, which only its trunk makes."),
    "beam": ({}, "BeamDecoderLayer of BeamForCausalLM takes attention_scaling besides hidden states, which only its"),
    "gemma3n_text": (
        {
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 40,
            "laurel_rank": 8,
            "layer_types": ["full_attention"] * 3,
            "altup_num_inputs": 2,
        },
        "of Gemma3nForCausalLM takes per_layer_input and shared_kv_states besides hidden states, which only its trunk",
    ),
    "deepseek_v32": (SPARSE, INDEXED),
    "glm_moe_dsa": (SPARSE, INDEXED),
    "lfm2": (
        {"layer_types": ["conv", "conv", "full_attention"]},
        "Lfm2Model of Lfm2ForCausalLM has no norm behind its last layer, or a norm of an unknown name",
    ),
    "ctrl": ({}, "CTRLModel of CTRLLMHeadModel has no norm.*Known names are norm, final_layernorm, "),
    # Models of another shape
    "bert": ({"is_decoder": True}, rf"The trunk of BertLMHeadModel \(BertModel\) {NO_STACK}"),
    "longcat_flash": (
        {
            **SPARSE,
            "num_hidden_layers": 4,
            "zero_expert_num": 2,
            "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
        },
        NO_STACK,
    ),
    "bart": (ENCODER, PASSED_BY),
    "mbart": (ENCODER, PASSED_BY),
    "opt": (
        {"ffn_dim": 32, "word_embed_proj_dim": 32},
        r"OPTForCausalLM does not run its trunk \(OPTModel\) as a whole",
    ),
    "modernbert-decoder": (
        {"bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 1, "local_attention": 8},
        "ModernBertDecoderForCausalLM has layers between its trunk and its output embedding. MTP heads cannot",
    ),
}
"""Options of families that sequential heads do not fit, and what the refusal says."""


def make_decoder(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model of a family of `CORE` or `OTHERS`, in evaluation mode; `overrides` go to its config."""
    options = {"model_type": family, **MOE_FAMILIES.get(family, {}), **(CORE | OTHERS).get(family, {})}
    return make_random_model({**options, **overrides}).eval()


def make_refused(family: str) -> PreTrainedModel:
    """A random model of a family of `REFUSED`."""
    return make_random_model({"model_type": family, **MOE_FAMILIES.get(family, {}), **REFUSED[family][0]})
