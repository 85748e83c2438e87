"""The scalar that a critic makes of features, with a norm and a projection."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ValueHead(nn.Module):
    """Scalar value of a head's features: `v = w . RMSNorm(x) + b`, in float32 whatever the model's dtype.

    The parameters keep the model's dtype, since an fp32 module inside a bf16 model breaks ZeRO-3; they belong to this
    module directly, so that ZeRO-3's pre-forward hook gathers them.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        # The name is one that the host's optimizer leaves out of weight decay.
        self.rmsnorm_weight = nn.Parameter(torch.ones(hidden_size))
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., D) to float32 values (...)."""
        with torch.autocast(features.device.type, enabled=False):
            x = F.rms_norm(features.float(), (features.shape[-1],), self.rmsnorm_weight.float(), self.eps)
            return x @ self.weight.float() + self.bias.float()


class ValueHeads(nn.ModuleList):
    """One [`ValueHead`] for each of K features."""

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., K, D) to float32 values (..., K)."""
        return torch.stack([cast(ValueHead, head)(features[..., k, :]) for k, head in enumerate(self)], dim=-1)
