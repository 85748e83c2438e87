"""Scaling of advantages by the reward variance that V(s_0) implies.

For whitening over the batch see `masking.masked_whiten`.
"""

import torch
from torch import Tensor

from rl_plugins.functional.masking import upcast


def value_implied_std(initial_values: Tensor, *, low: float = 0.0, high: float = 1.0, min_std: float = 0.1) -> Tensor:
    """The standard deviation of the final reward that its expected value implies.

    `sqrt((high - v)(v - low))` with `v` clamped to `[low, high]`: exact for a reward that is either `low` or
    `high`, an upper bound for any reward between them (Bhatia and Davis 2000). GRPO's sigma without a group.

    Args:
        initial_values: `v = V(s_0) (B,)`.
        low: the smallest reward.
        high: the largest reward.
        min_std: floor of the result, as a share of `high - low`.

    Returns:
        `(B,)`.

    Raises:
        ValueError: `high <= low` or `min_std <= 0`.
    """
    if high <= low:
        raise ValueError(f"low={low}, high={high}: give the range of the reward, low < high.")
    if min_std <= 0:
        raise ValueError(f"min_std={min_std}: give a positive floor, a sure value implies no spread at all.")
    v = upcast(initial_values).clamp(low, high)
    # The floor goes under the root, whose slope is infinite at 0.
    return torch.sqrt(((high - v) * (v - low)).clamp(min=(min_std * (high - low)) ** 2))


def value_scaled(
    advantages: Tensor, initial_values: Tensor, *, low: float = 0.0, high: float = 1.0, min_std: float = 0.1
) -> Tensor:
    """Divide the advantages of a sequence by its `value_implied_std`: `A_t / std(V(s_0))`.

    Args:
        advantages: `(B, T)`.
        initial_values: `V(s_0) (B,)`.
        low: the smallest reward.
        high: the largest reward.
        min_std: floor of the deviation, as a share of `high - low`.

    Returns:
        `(B, T)`.

    Raises:
        ValueError: the range or the floor is wrong, or there is not one initial value per sequence.
    """
    if initial_values.shape != advantages.shape[:1]:
        raise ValueError(f"initial_values {tuple(initial_values.shape)}: give V(s_0), ({advantages.shape[0]},).")
    std = value_implied_std(initial_values, low=low, high=high, min_std=min_std)
    return upcast(advantages) / std[:, None]
