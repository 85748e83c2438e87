"""Tiny random mixture-of-experts language models of many families, with routers that tell tokens apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from rl_plugins.functional.routing import (
    Scoring,
    expert_counts,
    load_fractions,
    router_probabilities,
    switch_balance_loss,
)

COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
LATENT = {
    "head_dim": None,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
LLAMA4 = {
    "model_type": "llama4_text",
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 8,
    "intermediate_size_mlp": 32,
}

MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_next": {
        "num_experts": 8,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
    "olmoe": {"num_experts": 8},
    "flex_olmo": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoe": {"num_local_experts": 8},
    # Without wide jitter one expert takes a token whole, and the router has no gradient.
    "phimoe": {"num_local_experts": 8, "router_jitter_noise": 0.3},
    "jetmoe": {"num_local_experts": 8, "kv_channels": 16},
    "hunyuan_v1_moe": {"num_experts": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "num_experts": 8,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "dbrx": {
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "llama4": {**LLAMA4, "num_experts_per_tok": 1},
    "llama4_top2": LLAMA4,
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v2_group": {
        **LATENT,
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v3": {**LATENT, "n_group": 4, "topk_group": 2},
    "glm4_moe": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "exaone_moe": {"num_experts": 8},
    "minimax_m2": {"num_local_experts": 8},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_num_shared_experts": 1},
    "lfm2_moe": {
        "num_experts": 8,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "afmoe": {"num_experts": 8, "num_shared_experts": 1},
}
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")


def spread_routers(model: nn.Module) -> None:
    """Random weights for routers, which start at zero, where every token ties, or so small that nearly all do."""
    for name, weight in model.named_parameters():
        routes = not {"gate", "router"}.isdisjoint(name.split(".")) and not name.endswith(SELECTION_BIASES)
        if routes and (weight.dim() > 1 or not weight.any()):
            nn.init.normal_(weight, std=0.5)


def make_moe_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family of `MOE_FAMILIES`; `overrides` go to its config. Leaves the global RNG alone."""
    options = {"model_type": family, **MOE_FAMILIES[family], **overrides}
    return make_random_model(options, seed, attn_implementation="eager")


def make_random_model(options: dict[str, Any], seed: int = 0, **loading: Any) -> PreTrainedModel:
    """A random model with the options of its config, of which `...` stands for the family's own default.

    Args:
        options: `model_type`, and what differs from `COMMON`.
        seed: Of the weights.
        loading: Keyword arguments of `from_config`.
    """
    kind = CONFIG_MAPPING[options["model_type"]]
    # A config keeps any option, so that one with a foreign name would look like the family's own.
    common = {key: value for key, value in COMMON.items() if hasattr(kind, key) or key in kind.attribute_map}
    given = {key: value for key, value in {**common, **options}.items() if value is not ... and key != "model_type"}
    config = kind(**given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **loading)
        spread_routers(model)
    return model


def mean_switch_loss(
    logits: Sequence[Tensor], indices: Sequence[Tensor], mask: Tensor | None = None, *, scoring: Scoring = "softmax"
) -> Tensor:
    """Mean over layers of Switch's loss, each layer's load counted over its own tokens."""
    layers = zip(logits, indices, strict=True)
    shares = [(x, load_fractions(expert_counts(i, x.shape[-1], mask), i.shape[-1])) for x, i in layers]
    return torch.stack([switch_balance_loss(x, f, mask, scoring=scoring) for x, f in shares]).mean()


def pooled_switch_loss(
    logits: Sequence[Tensor], indices: Sequence[Tensor], mask: Tensor | None = None, *, scoring: Scoring = "softmax"
) -> Tensor:
    """`E sum_i f_i P_i` of means over all layers, as transformers computes it."""
    rows = slice(None) if mask is None else mask.bool()
    p = torch.stack([router_probabilities(x[rows], scoring).mean(0) for x in logits]).mean(0)
    counts = torch.stack([expert_counts(i, len(p), mask) for i in indices]).sum(0)  # as many tokens in each layer
    return len(p) * (load_fractions(counts, indices[0].shape[-1]) * p).sum()
