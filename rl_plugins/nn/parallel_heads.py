"""Parallel heads: small blocks side by side on one hidden state (Gloeckle et al., 2404.19737)."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_plugins.nn.mtp_heads import MTPHeads, MTPHeadsConfig, Select
from rl_plugins.nn.seeding import fixed_seed
from rl_plugins.nn.value_head import ValueHead


class MTPHead(nn.Module):
    """One head: `x = h + W_down silu(W_up RMSNorm(h))`. The LM head turns `x` into logits, `ValueHead` into a value.

    `W_down` starts at zero, so `x = h`, and the token logits start as an exact copy of the main head's. The value
    weights start at zero, so the value starts at 0.
    """

    def __init__(self, config: MTPHeadsConfig) -> None:
        super().__init__()
        inner = cast(int, config.inner_size)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.up = nn.Linear(config.hidden_size, inner, bias=False)
        self.down = nn.Linear(inner, config.hidden_size, bias=False)
        self.value = ValueHead(config.hidden_size, config.norm_eps)
        nn.init.normal_(self.up.weight, std=config.hidden_size**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map trunk states (..., D) to features (..., D), the input of the LM head."""
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))

    def values(self, hidden: Tensor) -> Tensor:
        """Map trunk states (..., D) to float32 values (...)."""
        return self.value(self(hidden))


class ParallelHeads(MTPHeads):
    """K parallel heads on the trunk's hidden state: `[logits_k, v_k] = head_k(h_t)`.

    Head k reads `h_t` alone. Its logits predict `y_{t+k}` (Gloeckle et al., 2404.19737, section 2; the main head
    predicts `y_t`) and its value forecasts the return from `r_{t+k-1}` on, so `v_1[t]` estimates `V(s_t)`.

    Args:
        config: Shape of the heads.
        seed: Seed of the initial weights; equal on all ranks. The caller's random state is left alone.
    """

    ahead = 1
    reads_rows = False

    def __init__(self, config: MTPHeadsConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with fixed_seed(seed):
            self.heads = nn.ModuleList(MTPHead(config) for _ in range(config.num_heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the values of all heads.

        Args:
            hidden: Trunk states (B, T, D).

        Returns:
            Values (B, T, K), float32.
        """
        return torch.stack([head.values(hidden) for head in self], dim=-1)

    def features(self, hidden: Tensor) -> Tensor:
        """Compute the inputs of the LM head, one per head.

        Args:
            hidden: Trunk states (B, T, D).

        Returns:
            Features (B, T, K, D).
        """
        return torch.stack([head(hidden) for head in self], dim=-2)

    def __iter__(self) -> Iterator[MTPHead]:
        """Go through the heads in order, k = 1..K."""
        return (cast(MTPHead, head) for head in self.heads)

    @property
    def value_path(self) -> nn.Module:
        """The heads themselves, which turn hidden states into values."""
        return self

    def draft_only(self) -> None:
        """Freeze the value weights."""
        for head in self:
            head.value.requires_grad_(False)

    def token_features(self, states: Tensor, head: int, chosen: tuple[Tensor, Tensor]) -> Tensor:
        """Compute features (N, D) of one head at some positions; other positions cost nothing."""
        return self.heads[head](states[chosen])

    def _selected(self, hidden: Tensor, select: Select, tame: Callable[[Tensor], Tensor]) -> Tensor:
        return tame(select(hidden))
