"""Step sizes of stochastic approximation, as functions of how often an entry of the table was updated."""

from collections.abc import Callable

import torch
from torch import Tensor

StepSize = Callable[[Tensor], Tensor]
"""Maps counts of updates `n >= 1` of any shape, the current one included, to step sizes in `[0, 1]`."""


def polynomial_step_size(omega: float = 1.0, *, offset: float = 0.0) -> StepSize:
    """Make `alpha_n = ((1 + offset) / (n + offset))^omega`, which meets the conditions of Robbins and Monro (1951).

    `sum_n alpha_n = inf` needs `omega <= 1`, and `sum_n alpha_n^2 < inf` needs `omega > 1/2`. `omega = 1` averages all
    targets, which suits Monte Carlo. With 0.6 to 0.8 old targets are forgotten sooner, which suits targets that
    bootstrap.

    Args:
        omega: in `(0.5, 1]`.
        offset: at least 0; steps stay large for about `offset` updates.

    Raises:
        ValueError: `omega` or `offset` is out of range.
    """
    if not 0.5 < omega <= 1:
        raise ValueError(f"omega={omega}: give an exponent in (0.5, 1], or the estimates need not converge.")
    if not 0 <= offset < float("inf"):
        raise ValueError(f"offset={offset}: give 0 or a positive number of updates.")
    return lambda counts: ((1 + offset) / (counts.double() + offset)) ** omega


def constant_step_size(alpha: float) -> StepSize:
    """Make `alpha_n = alpha`: estimates follow a changing target, with noise of a variance in proportion to `alpha`.

    It does not satisfy the conditions of Robbins and Monro: estimates do not converge unless the targets are free of
    noise.

    Args:
        alpha: in `(0, 1]`; 1 replaces the estimate.

    Raises:
        ValueError: `alpha` is out of range.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha}: give a step size in (0, 1].")
    return lambda counts: torch.full_like(counts, alpha, dtype=torch.float64)
