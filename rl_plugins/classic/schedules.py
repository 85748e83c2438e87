"""Settings that change while an agent trains."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Schedule = float | Callable[[float], float]
"""A number, or a function of the share of training that remains, from 1 down to 0."""


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line: `end + remaining (start - end)`.

    Args:
        start: The value when training starts.
        end: The value when it ends.
    """

    start: float
    end: float = 0.0

    def __call__(self, remaining: float) -> float:
        return self.end + remaining * (self.start - self.end)


def value_at(schedule: Schedule, remaining: float) -> float:
    """The value of a schedule where the share `remaining` of training is left."""
    return schedule(remaining) if callable(schedule) else schedule


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = rate


# Checkpoints hold the settings of an agent, and torch.load's safe mode admits classes by name only.
torch.serialization.add_safe_globals([Linear])
