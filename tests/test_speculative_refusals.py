"""What speculative decoding cannot do is refused, with what to do about it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, SynthIDTextWatermarkingConfig

from rl_plugins.nn.cache_name import cache_name
from rl_plugins.rollouts import SpeculativeDecoder

from .helpers.speculative_models import EXPERTS, PROMPTS, attach_random_heads, decode, make, padded


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    """Tiny model that says something, with three heads of which some drafts are accepted."""
    return attach_random_heads(tiny_model(seed=1, initializer_range=0.5, tie_word_embeddings=False), 3, 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"output_scores": True}, "output_scores=True is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not supported"),
        ({"guidance_scale": 1.5}, "ClassifierFreeGuidance"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [3, 4]}, "PrefixConstrained"),
        ({"encoder_repetition_penalty": 1.5}, "EncoderRepetitionPenalty"),
        ({"encoder_no_repeat_ngram_size": 2}, "EncoderNoRepeatNGram"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])}, "SynthIDText"),
        ({"cache_implementation": "static"}, "StaticLayer"),
        ({"cache_implementation": "offloaded"}, "does not move its cache"),
        ({"use_cache": False}, "use_cache=False"),
        ({cache_name(): DynamicCache()}, f"do not pass {cache_name()}"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(model, padded(PROMPTS), **options)


def test_prompts_that_are_refused(model: Any) -> None:
    inputs = padded(PROMPTS)
    cache = DynamicCache(config=model.config)
    model(inputs["input_ids"][:, :3], **{cache_name(): cache})
    with pytest.raises(ValueError, match=f"do not pass {cache_name()}"):
        decode(model, inputs, **{cache_name(): cache})
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        decode(model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]})


def test_numbers_of_drafts_that_are_refused(model: Any, tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        SpeculativeDecoder(0)
    with pytest.raises(ValueError, match="draft_cost must be at least 0"):
        SpeculativeDecoder(draft_cost=-0.1)
    with pytest.raises(ValueError, match="num_draft_tokens=4, but the model has 3 heads"):
        decode(model, padded(PROMPTS), decoder=SpeculativeDecoder(4))
    with pytest.raises(ValueError, match="no MTP heads to draft with"):
        decode(tiny_model(), padded(PROMPTS))


@pytest.mark.parametrize("logits", [float("nan"), -float("inf")])
def test_no_token_to_sample(model: Any, logits: float) -> None:
    class Spoil:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, logits) if ids.shape[1] > 9 else scores

    with pytest.raises(ValueError, match="no token to sample"):
        decode(model, padded(PROMPTS), do_sample=True, logits_processor=LogitsProcessorList([Spoil()]))


UNSUITABLE: dict[str, tuple[dict[str, Any], str]] = {
    "llama4_text": ({**EXPERTS, "attention_chunk_size": 8}, "chunked_attention"),
    "jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        "LinearAttentionLayer",
    ),
    "qwen3_next": (
        {**EXPERTS, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
        "LinearAttentionLayer",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "LinearAttentionLayer"),
    "falcon_mamba": ({"state_size": 4}, "a state of its own|LinearAttentionLayer"),
    "mamba": ({"state_size": 4}, "a state of its own|LinearAttentionLayer"),
    "roformer": ({"is_decoder": True}, "takes no position_ids"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "does not run its trunk"),
}


@pytest.mark.parametrize("family", UNSUITABLE)
def test_models_that_are_refused(family: str) -> None:
    config, message = UNSUITABLE[family]
    model = make(family, config, "eager")
    with pytest.raises(ValueError, match=message):
        decode(model, padded(PROMPTS))
    if family != "opt":  # where only a forward pass can tell
        with pytest.raises(ValueError, match="To generate without speculation"):
            SpeculativeDecoder().check(model)


def test_what_can_be_checked_before_any_work(model: Any, tiny_model: Callable[..., Any]) -> None:
    SpeculativeDecoder(3).check(model)
    with pytest.raises(ValueError, match="num_draft_tokens=4, but the model has 3 heads"):
        SpeculativeDecoder(4).check(model)
    with pytest.raises(ValueError, match="no MTP heads to draft with"):
        SpeculativeDecoder().check(tiny_model())
