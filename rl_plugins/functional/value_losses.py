"""Regression losses of the value heads, per element: reduce them with `masked_mean`.

Arguments that functions here share, and do not list again:
    values: `v (B, T)` or `(B, T, K)`.
    targets: `Y`, the shape of `values`.

Results have the shape of `values`. All functions raise `ValueError` where shapes differ or a number is not positive.
Nothing is detached here: pass targets and old values under stop-gradient. There is no mask either: where padding may
hold NaN, pass the inputs through `zero_masked` first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_plugins.functional.checks import check_positive, check_shape
from rl_plugins.functional.masking import upcast

ALIGN = "align values and targets with head_targets"
"""Advice in the error for shapes that differ, such as `(B, T, K)` and `(B, T)`."""


def squared_error(values: Tensor, targets: Tensor) -> Tensor:
    """Regress values on targets: `(v - Y)^2`, without the factor 1/2 that some codebases add."""
    check_shape("values", values, targets.shape, ALIGN)
    return (upcast(values) - upcast(targets)) ** 2


def clipped_squared_error(values: Tensor, targets: Tensor, old_values: Tensor, *, clip_range: float) -> Tensor:
    """Regress values on targets, without a gain from moving further than `clip_range` from the old value.

    `max((v - Y)^2, (clip(v, v_old - c, v_old + c) - Y)^2)`, PPO2's pessimistic error without its factor 1/2
    (openai/baselines, ppo2).

    Args:
        old_values: `v_old`, as saved in the rollout, the shape of `values`.
        clip_range: `c`, above 0.
    """
    check_positive("give a positive width, or use squared_error", clip_range=clip_range)
    check_shape("old_values", old_values, values.shape, "give the shape of values")
    old = upcast(old_values)
    clipped = old + (upcast(values) - old).clamp(-clip_range, clip_range)
    return torch.maximum(squared_error(values, targets), squared_error(clipped, targets))


def huber(values: Tensor, targets: Tensor, *, delta: float = 1.0) -> Tensor:
    """Regress values on targets that have outliers, with a bound on their gradient (Huber's loss).

    `e^2 / 2` where `|e| = |v - Y| <= delta`, and `delta (|e| - delta / 2)` beyond. The 1/2 is part of its usual
    definition, so inside `delta` the loss is half of `squared_error`.

    Args:
        delta: error from which the loss is linear, above 0.
    """
    check_positive("give a positive error, or use squared_error", delta=delta)
    check_shape("values", values, targets.shape, ALIGN)
    return F.huber_loss(upcast(values), upcast(targets), reduction="none", delta=delta)
