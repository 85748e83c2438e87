"""Families of models with native MTP layers, and their losses by slow loops."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import MtpModel

from rl_plugins.nn import (
    NativeMTP,
)

FAMILIES = ["deepseek_v3", "glm4_moe"]


def doubled(model: Any) -> Any:
    """In float64, which neither the fused experts nor eager attention know: its masks become NaN."""
    model.set_experts_implementation("eager")
    model.set_attn_implementation("sdpa")
    return model.double().eval()


def transformers_layers(model: Any, native: NativeMTP) -> MtpModel:
    """transformers' own module with the same weights."""
    mtp = MtpModel(model, native.num_layers).to(model.dtype).eval()
    mtp.layers.load_state_dict(native.layers.state_dict())
    return mtp


def trunk_states(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model.model(input_ids=ids, attention_mask=mask).last_hidden_state


@torch.no_grad()
def slow_losses(model: Any, native: NativeMTP, ids: Tensor, labels: Tensor, temperature: float = 1.0) -> list[float]:
    """Equation 24 of 2412.19437, one row and one token after the other, with transformers' own module."""
    mtp = transformers_layers(model, native)
    sums = [0.0] * native.num_layers
    for row, row_labels in zip(ids, labels, strict=True):
        hidden = trunk_states(model, row[None])
        for k in range(1, native.num_layers + 1):
            length = len(row) - k
            positions = torch.arange(k, len(row))[None]
            hidden = mtp.forward_layer(k - 1, hidden[:, :length], positions, None, input_ids=row[None, k:])
            log_probs = (mtp._project_to_logits(hidden) / temperature).log_softmax(-1)[0]
            for p in range(length - 1):
                label = int(row_labels[p + 1 + k])
                sums[k - 1] -= 0.0 if label == -100 else float(log_probs[p, label])
    return sums
