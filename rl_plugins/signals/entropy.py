"""The coefficient of the entropy bonus, constant or steered towards a wanted entropy."""

import math

import torch
from torch import Tensor

from rl_plugins.functional.masking import Reduce, masked_sum


class EntropyControl:
    """Coefficient `c` of the entropy bonus `c H(pi)`.

    An adaptive coefficient rises by a step while the entropy is at most the target, and falls otherwise. While the
    entropy is above the target, there is no bonus at all (TRL's `use_adaptive_entropy`).

    Args:
        coef: Coefficient at the start.
        adaptive: Whether the coefficient changes.
        target: Entropy per token, in nats, below which the bonus acts.
        delta: Step of the coefficient after an optimizer step.
        low: Smallest coefficient.
        high: Largest coefficient.
    """

    def __init__(
        self,
        coef: float,
        *,
        adaptive: bool = False,
        target: float = 0.0,
        delta: float = 0.0,
        low: float = 0.0,
        high: float = math.inf,
    ) -> None:
        self.coef, self.adaptive, self.target, self.delta = coef, adaptive, target, delta
        self.low, self.high = low, high
        self._last = math.inf  # no bonus before the first entropy is known
        self._sums: Tensor | None = None

    @property
    def enabled(self) -> bool:
        """Whether there may be a bonus: an adaptive coefficient may also rise from 0."""
        return self.adaptive or self.coef != 0.0

    @property
    def coefficient(self) -> float | None:
        """`c` for the micro-batches of this optimizer step; `None` where there is never a bonus."""
        if not self.enabled:
            return None
        return 0.0 if self.adaptive and self._last > self.target else self.coef

    def observe(self, entropies: Tensor, mask: Tensor) -> None:
        """Record the entropies (B, T) of a micro-batch at the tokens of a mask (B, T)."""
        if self.adaptive:
            sums = torch.stack([masked_sum(entropies.detach(), mask), mask.sum().float()])
            self._sums = sums if self._sums is None else self._sums + sums

    def end_step(self, reduce: Reduce) -> None:
        """Set the coefficient for the next optimizer step, from the entropy of this one over all ranks."""
        if self._sums is None:
            return
        total, count = reduce(self._sums)
        self._last, self._sums = (total / count.clamp(min=1.0)).item(), None
        if self._last <= self.target:
            self.coef = min(self.coef + self.delta, self.high)
        else:
            self.coef = max(self.coef - self.delta, self.low)
