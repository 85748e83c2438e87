"""Results of one run of the heads inside a training forward."""

from dataclasses import dataclass, field

from torch import Tensor

from rl_plugins.nn.gradient import GradientStats


@dataclass
class HeadRun:
    """Results of one run of heads inside a model's forward.

    `MTPHeads.running` yields an empty object, which the next forward of the model fills.

    Attributes:
        values: Values of the heads (B, T, K), float32, with gradient; `None` where heads only draft.
        target_values: Values of slow heads on the same states (B, T, K), without gradient; `None` where no slow heads
            were given.
        token_losses: Summed cross-entropy of each head's tokens (K,); `None` without labels.
        token_counts: Numbers of labels that these sums stand for (K,), float32.
        stats: Norms of the value gradient that entered the trunk; filled by the backward pass.
    """

    values: Tensor | None = None
    target_values: Tensor | None = None
    token_losses: Tensor | None = None
    token_counts: Tensor | None = None
    stats: GradientStats = field(default_factory=GradientStats)

    @property
    def is_filled(self) -> bool:
        """Whether a forward has run the heads."""
        return self.values is not None or self.token_losses is not None
