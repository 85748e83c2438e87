"""Regression losses of the value heads, per element: reduce them with `masked_mean`.

Nothing is detached here: pass targets and old values under stop-gradient. There is no mask either: where
padding may hold NaN, pass the inputs through `zero_masked` first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_plugins.functional.masking import upcast


def squared_error(values: Tensor, targets: Tensor) -> Tensor:
    """`(v - Y)^2`, without the factor 1/2 that some codebases add.

    Args:
        values: `v (B, T)` or `(B, T, K)`.
        targets: `Y`, the shape of `values`.

    Returns:
        The shape of `values`.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(values, targets)
    return (upcast(values) - upcast(targets)) ** 2


def clipped_squared_error(values: Tensor, targets: Tensor, old_values: Tensor, *, clip_range: float) -> Tensor:
    """PPO2's pessimistic error, which does not reward leaving the old value by more than `clip_range`.

    `max((v - Y)^2, (clip(v, v_old - c, v_old + c) - Y)^2)`, without a factor 1/2 (openai/baselines, ppo2).

    Args:
        values: `v (B, T)` or `(B, T, K)`.
        targets: `Y`, the shape of `values`.
        old_values: `v_old`, as saved in the rollout, the shape of `values`.
        clip_range: `c`.

    Returns:
        The shape of `values`.

    Raises:
        ValueError: the shapes differ or `clip_range` is not positive.
    """
    if clip_range <= 0:
        raise ValueError(f"clip_range={clip_range}: give a positive width, or use squared_error.")
    _check_shapes(values, old_values)
    old = upcast(old_values)
    clipped = old + (upcast(values) - old).clamp(-clip_range, clip_range)
    return torch.maximum(squared_error(values, targets), squared_error(clipped, targets))


def huber(values: Tensor, targets: Tensor, *, delta: float = 1.0) -> Tensor:
    """Huber's loss: `e^2 / 2` where `|e| = |v - Y| <= delta`, and `delta (|e| - delta / 2)` beyond.

    The 1/2 is part of its usual definition, so inside `delta` it is half of `squared_error`.

    Args:
        values: `v (B, T)` or `(B, T, K)`.
        targets: `Y`, the shape of `values`.
        delta: where it turns linear.

    Returns:
        The shape of `values`.

    Raises:
        ValueError: the shapes differ or `delta` is not positive.
    """
    _check_shapes(values, targets)
    return F.huber_loss(upcast(values), upcast(targets), reduction="none", delta=delta)


def _check_shapes(values: Tensor, other: Tensor) -> None:
    """Broadcasting `(B, T, K)` against `(B, T)` would train on the wrong pairs without a word."""
    if values.shape != other.shape:
        raise ValueError(f"values {tuple(values.shape)} against {tuple(other.shape)}: align them with head_targets.")
