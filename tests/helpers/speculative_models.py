"""Tiny models of many families with random heads, ragged prompts, and calls of `generate`, for tests of speculative
decoding."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel

from rl_plugins.nn import DepthModule, MTPHead, PolyakTarget, ValueHead, attach_mtp_heads
from rl_plugins.rollouts import SpeculativeDecoder, SpeculativeOutput, ValueRecord

PAD, EOS = 0, 1
PROMPTS = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14, 15, 2], [4], [5, 5, 6, 3, 2]]
NEW = 16


def randomise_heads(heads: nn.Module, scale: float, seed: int = 0) -> nn.Module:
    """Give heads, or the value path of sequential ones, random values, and blocks that differ from the main head the
    more the larger `scale` is."""
    generator = torch.Generator().manual_seed(seed)

    def randomise(weight: Tensor, size: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * size)

    with torch.no_grad():
        for module in heads.modules():
            if isinstance(module, MTPHead):
                randomise(module.down.weight, scale)
            if isinstance(module, DepthModule):
                # Little but the trunk's state, which often leads where the trunk goes.
                size = module.eh_proj.weight.shape[0]
                randomise(module.eh_proj.weight, scale)
                module.eh_proj.weight[:, size:] += 8.0 * torch.eye(size)
            if isinstance(module, ValueHead):
                randomise(module.weight, 0.3)
                randomise(module.bias, 1.0)
    return heads


def attach_random_heads(
    model: PreTrainedModel, num_heads: int, scale: float, seed: int = 0, head_type: str = "parallel"
) -> PreTrainedModel:
    """The model, with random heads, in evaluation mode."""
    randomise_heads(attach_mtp_heads(model, num_heads, head_type=head_type), scale, seed)
    return model.eval()


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Prompts padded on the left, as `generate` takes them."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def processors_of(model: Any, inputs: dict[str, Tensor], **options: Any) -> LogitsProcessorList:
    """The logits processors that `generate` prepares for these options."""

    def grab(model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **others: Any) -> Any:
        return logits_processor

    return model.generate(**inputs, custom_generate=grab, **options)


def decode(model: Any, inputs: dict[str, Tensor], **options: Any) -> SpeculativeOutput:
    """Speculative decoding, always with as many drafts as there are heads."""
    decoder = options.pop("decoder", None) or SpeculativeDecoder(draft_cost=0.0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **settings, custom_generate=decoder)


def decode_with_values(
    model: Any, inputs: dict[str, Tensor], target: PolyakTarget | None = None, flush_every: int = 64, **options: Any
) -> tuple[SpeculativeOutput, Tensor, Tensor]:
    """As `decode`, with the values of all heads and of their slow copies in the state of every new token (B, T, K)."""
    decoder = options.pop("decoder", None) or SpeculativeDecoder(draft_cost=0.0)
    decoder.recorder = recorder = ValueRecord(model.mtp_heads, target, flush_every=flush_every)
    output = decode(model, inputs, decoder=decoder, **options)
    saved = recorder.finish(output.log_probs.shape[1])
    assert saved is not None
    return output, *saved


def plain(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})


# Model families

COMMON: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    **EXPERTS,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"head_dim": ..., "alibi": True, "new_decoder_architecture": False, "num_key_value_heads": ...},
    "phi": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {**WINDOWS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 8},
    "gpt_oss": {**WINDOWS, **EXPERTS},
    "qwen3_moe": EXPERTS,
    "deepseek_v3": LATENT,
    "granite": {"logits_scaling": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    "cohere": {"logit_scale": 0.5},
}
PARALLEL_ONLY = ("bloom", "falcon")
"""Models with ALiBi, which only their trunk makes."""


def make_plain(family: str, config: dict[str, Any], attention: str) -> Any:
    """A random model of a family, without heads."""
    settings = {key: value for key, value in {**COMMON, **config}.items() if value is not ...}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings), attn_implementation=attention).eval()


def make(
    family: str, config: dict[str, Any], attention: str, num_heads: int = 3, head_type: str = "parallel"
) -> PreTrainedModel:
    return attach_random_heads(make_plain(family, config, attention), num_heads, 0.1, head_type=head_type)
