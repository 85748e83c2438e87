"""Multi-token-prediction heads that also output a value: the critic inside the policy."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_plugins.nn.seeding import fixed_seed
from rl_plugins.nn.trunk_tap import TrunkTap


@dataclass(frozen=True)
class MTPHeadsConfig:
    """Shape of a set of heads.

    Args:
        num_heads: K, the number of heads; head k predicts token `y_{t+k}` and the value of `s_{t+k-1}`.
        hidden_size: D of the trunk.
        inner_size: Width of each head's residual block.
        norm_eps: Epsilon of the RMS norms.
    """

    num_heads: int
    hidden_size: int
    inner_size: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("num_heads", "hidden_size", "inner_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, int | float]:
        """Plain dictionary for a JSON file."""
        return asdict(self)


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


class MTPHead(nn.Module):
    """One head: `x = h + W_down silu(W_up RMSNorm(h))`; the LM head reads `x` for tokens, `ValueHead` for the value.

    `W_down` starts at zero, so `x = h`: the token logits start as an exact copy of the main head's, and the value
    weights start at zero, so the value starts at 0.
    """

    def __init__(self, config: MTPHeadsConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.up = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.value = ValueHead(config.hidden_size, config.norm_eps)
        nn.init.normal_(self.up.weight, std=config.hidden_size**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map trunk states (..., D) to features (..., D), the input of the LM head."""
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))

    def values(self, hidden: Tensor) -> Tensor:
        """Map trunk states (..., D) to float32 values (...)."""
        return self.value(self(hidden))


class MTPHeads(TrunkTap):
    """K parallel heads on the trunk's hidden state: `[logits_k, v_k] = head_k(h_t)`.

    Head k reads `h_t` alone. Its logits predict `y_{t+k}` (Gloeckle et al., 2404.19737, section 2; the main head
    predicts `y_t`) and its value forecasts the return from `r_{t+k-1}` on, so `v_1[t]` estimates `V(s_t)`.

    Args:
        config: Shape of the heads.
        seed: Seed of the initial weights. Fixed, so that every rank starts from the same heads and the caller's
            random state is left alone.
    """

    def __init__(self, config: MTPHeadsConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with fixed_seed(seed):
            self.heads = nn.ModuleList(MTPHead(config) for _ in range(config.num_heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values of all heads.

        Args:
            hidden: Trunk states (B, T, D).

        Returns:
            Values (B, T, K), float32.
        """
        return torch.stack([head.values(hidden) for head in self], dim=-1)

    def features(self, hidden: Tensor) -> Tensor:
        """Inputs of the LM head, one per head.

        Args:
            hidden: Trunk states (B, T, D).

        Returns:
            Features (B, T, K, D).
        """
        return torch.stack([head(hidden) for head in self], dim=-2)

    def draft_only(self) -> None:
        """Leave the value weights as they are: where nothing learns values, they get no gradient, which DDP would
        wait for."""
        for head in self:
            head.value.requires_grad_(False)

    def __iter__(self) -> Iterator[MTPHead]:
        """The heads in order, k = 1..K."""
        return (cast(MTPHead, head) for head in self.heads)
