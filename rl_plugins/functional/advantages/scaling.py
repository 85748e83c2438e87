"""Scaling of advantages by the reward variance that V(s_0) implies. For whitening over the batch see `masking`.

Arguments that functions here share, and do not list again:
    initial_values: `v = V(s_0) (B,)`.
    low: the smallest reward.
    high: the largest reward, above `low`.
    min_std: floor of the deviation, above 0, as a share of `high - low`.

All raise `ValueError` where shapes do not fit or a number is out of range.
"""

import torch
from torch import Tensor

from rl_plugins.functional.checks import check_positive, check_shape
from rl_plugins.functional.masking import upcast


def value_implied_std(initial_values: Tensor, *, low: float = 0.0, high: float = 1.0, min_std: float = 0.1) -> Tensor:
    """Derive the spread of a completion's final reward from its expected value alone: `sqrt((high - v)(v - low))`.

    `v` is clamped to `[low, high]`. The result is exact for a reward that is either `low` or `high`, and an upper
    bound for any reward between them (Bhatia and Davis 2000). It stands in for GRPO's deviation where there is no
    group.

    Returns:
        `(B,)`.
    """
    if high <= low:
        raise ValueError(f"low={low}, high={high}: give the range of the reward, low < high.")
    check_positive("give a positive floor, since a sure value implies no spread at all", min_std=min_std)
    v = upcast(initial_values).clamp(low, high)
    # The floor is applied before the root, whose slope is infinite at 0.
    return torch.sqrt(((high - v) * (v - low)).clamp(min=(min_std * (high - low)) ** 2))


def value_scaled(
    advantages: Tensor, initial_values: Tensor, *, low: float = 0.0, high: float = 1.0, min_std: float = 0.1
) -> Tensor:
    """Divide the advantages of a sequence by its `value_implied_std`, as GRPO divides by that of a group.

    `A_t / std(V(s_0))`.

    Args:
        advantages: `A_t (B, T)`.

    Returns:
        `(B, T)`.
    """
    check_shape("initial_values", initial_values, advantages.shape[:1], "give V(s_0) of each completion")
    std = value_implied_std(initial_values, low=low, high=high, min_std=min_std)
    return upcast(advantages) / std[:, None]
