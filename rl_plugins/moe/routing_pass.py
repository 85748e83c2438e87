"""What one training forward tells about the load: tokens per expert, and the shares that its losses refer to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RoutingPass:
    """One forward of the trunk, from its start until its gradient has passed every router.

    Args:
        mask: Real tokens (B, S), or `None` where all are real.
        shape: (B, S).
        counts: Tokens per expert, by router.
        targets: Biases (E,) that the quantile rule moves to, times tokens, by router.
        fractions: Load f (E,) that the auxiliary loss refers to, by router; complete once the forward is over.
        waiting: Routers whose logits have not been given the loss's gradient yet, with the experts that they chose
            (N, k). Under reentrant checkpointing that is all of them until the forward is run again.
    """

    mask: Tensor | None
    shape: tuple[int, int]
    counts: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    fractions: dict[int, Tensor] = field(default_factory=dict)
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)

    def token_mask(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """The mask of a router's tokens (N,); `None` where it sees others than the trunk's (image patches)."""
        if self.mask is None or self.mask.numel() != num_tokens:
            return None
        return self.mask.reshape(-1).to(device)

    def rows(self, num_tokens: int) -> tuple[int, int]:
        """How a router's N tokens fall into sequences: (B, S), or one where they are others."""
        return self.shape if num_tokens == self.shape[0] * self.shape[1] else (1, num_tokens)
