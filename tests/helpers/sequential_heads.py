"""Models with sequential heads, and features and losses of the heads by slow loops."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import MtpModel

from rl_plugins.nn import SequentialHeads
from rl_plugins.nn.attachment import trunk_of

RELEASED = ["deepseek_v3", "glm4_moe"]
"""Families whose checkpoints may hold sequential heads."""


def doubled(model: Any) -> Any:
    """In float64, which neither the fused experts nor eager attention know: its masks become NaN."""
    model.set_experts_implementation("eager")
    model.set_attn_implementation("sdpa")
    return model.double().eval()


def transformers_layers(model: Any, heads: SequentialHeads) -> MtpModel:
    """transformers' own module with the same weights."""
    mtp = MtpModel(model, heads.config.num_heads).to(model.dtype).eval()
    mtp.layers.load_state_dict(heads.layers.state_dict())
    return mtp


def trunk_states(model: Any, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """Last hidden states (B, S, D)."""
    return trunk_of(model)(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).last_hidden_state


def features_of(model: Any, heads: SequentialHeads, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """Features (B, S, K, D) that the heads make inside a forward pass of the model."""
    made: list[Tensor] = []
    with heads.watching(lambda hidden: made.append(heads.states(hidden))):
        model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
    return made[0]


@torch.no_grad()
def slow_features(model: Any, heads: SequentialHeads, ids: Tensor) -> Tensor:
    """Features (B, S, K, D) of rows without padding, every one from a prefix that ends there: equations 21 and 22 of
    2412.19437."""
    found = torch.zeros(*ids.shape, heads.config.num_heads, heads.config.hidden_size, dtype=model.dtype)
    for i, row in enumerate(ids):
        for end in range(len(row)):
            prefix = row[None, : end + 1]
            below = trunk_states(model, prefix)
            for k in range(1, min(end, heads.config.num_heads) + 1):
                positions = torch.arange(k, end + 1)[None]
                below = heads.run(k, below[:, :-1], prefix[:, k:], positions, None)
                found[i, end, k - 1] = below[0, -1]
    return found


@torch.no_grad()
def slow_losses(
    model: Any, heads: SequentialHeads, ids: Tensor, labels: Tensor, temperature: float = 1.0
) -> list[float]:
    """Equation 24 of 2412.19437, one row and one token after the other, with transformers' own module."""
    mtp = transformers_layers(model, heads)
    sums = [0.0] * heads.config.num_heads
    for row, row_labels in zip(ids, labels, strict=True):
        hidden = trunk_states(model, row[None])
        for k in range(1, heads.config.num_heads + 1):
            length = len(row) - k
            positions = torch.arange(k, len(row))[None]
            hidden = mtp.forward_layer(k - 1, hidden[:, :length], positions, None, input_ids=row[None, k:])
            log_probs = (mtp._project_to_logits(hidden) / temperature).log_softmax(-1)[0]
            for p in range(length - 1):
                label = int(row_labels[p + 1 + k])
                sums[k - 1] -= 0.0 if label == -100 else float(log_probs[p, label])
    return sums
